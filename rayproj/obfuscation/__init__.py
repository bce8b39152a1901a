"""The 22 obfuscations of Stimberg et al. 2023, "Benchmarking Robustness to Adversarial Image Obfuscations" (NeurIPS,
Datasets and Benchmarks), by their names, rewritten from their descriptions.

The authors published data and their evaluation, and on purpose no code that makes obfuscated images. What stands here is
not theirs, and its images are not the benchmark's: figures from the one and the other do not compare. It is for training
and measuring filters. So the ranges of strength are fixed and stand in the code; nothing here searches for what gets past
a given filter; patches are optimised against classifiers of this project alone.
"""

from rayproj.obfuscation.assets import Assets, AssetsConfig
from rayproj.obfuscation.base import KEY, Obfuscation, between, whole
from rayproj.obfuscation.registry import (
    CLEAN,
    HELD_OUT,
    OBFUSCATIONS,
    TRAINING,
    ObfuscateConfig,
    chosen,
    mixture,
    obfuscate,
    of_name,
    regenerate,
)

__all__ = [
    "CLEAN",
    "HELD_OUT",
    "KEY",
    "OBFUSCATIONS",
    "TRAINING",
    "Assets",
    "AssetsConfig",
    "ObfuscateConfig",
    "Obfuscation",
    "between",
    "chosen",
    "mixture",
    "obfuscate",
    "of_name",
    "regenerate",
    "whole",
]
