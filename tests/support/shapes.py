"""Small images with captions and styles, and trained models that draw such by prompt and style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.engine.world import World
from rayproj.synthesis.plan import GenerateConfig
from tests.support import runs

CAPTIONS = ["a red square", "a blue disc", "", "a green bar"]
AUTOENCODER = {"channels": [8, 8], "norm_groups": 4}
DENOISER = {"channels": [16, 32], "head_dim": 16, "norm_groups": 8}
CONDITIONS: dict[str, Any] = {
    "style": {"dropout": 0.2},
    "text": {"dropout": 0.2, "captions": {"caption": 1.0}},
}


def write_images(uri: str) -> Dataset:
    fields = {"image": Field("png", (3, 8, 8)), "label": Field("int"), "caption": Field("str"), "style": Field("str")}
    dataset = Dataset.create(uri, Header("shapes", fields, 12, 6, ("x",)))
    rng = np.random.default_rng(0)
    for shard in (0, 1):
        samples = [
            {"key": f"{i:08d}", "image": rng.integers(0, 256, (3, 8, 8), dtype=np.uint8), "label": 0}
            | {"caption": CAPTIONS[i % 4], "style": ("flat", "bold", "other")[i % 3]}
            for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.1)
    return dataset


def train_both(world: World, folder: str) -> None:
    images = write_images(f"{folder}/images")
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, AUTOENCODER)
    text, properties = {"tokens": 6, "captions": ["caption"]}, {"style": ["flat", "bold"]}
    latents = runs.latents(f"{folder}/latents", images, autoencoder, text, properties)
    runs.denoiser(world, f"{folder}/denoiser", latents, {"denoiser": DENOISER, "conditions": CONDITIONS})
    small = {**DENOISER, "channels": [16, 16]}
    runs.denoiser(world, f"{folder}/weak", latents, {"denoiser": small, "conditions": CONDITIONS})
    style = {"style": CONDITIONS["style"]}
    runs.denoiser(world, f"{folder}/another", latents, {"denoiser": small, "conditions": style})


def config_of(folder: Path, **changes: Any) -> GenerateConfig:
    """Ten images of both prompts in both styles."""
    asked = {"prompts": ["a red square", "a blue disc"], "properties": {"style": ["bold", "flat"]}}
    sampler = SamplerConfig(3, weights={"text": 3.0, "style": 1.5})
    whole: dict[str, Any] = {"samples": 10, "shard_size": 4, "batch": 3, "sampler": sampler, **asked}
    return GenerateConfig(**{"model": str(folder / "denoiser"), "out": str(folder / "out"), **whole, **changes})
