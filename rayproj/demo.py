"""The whole chain in small: nine ordinary jobs on an embedded or given Ray, under one config."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from rayproj.jobs import (
    encode_latents,
    evaluate,
    finetune_private,
    generate,
    import_data,
    report,
    train_autoencoder,
    train_classifier,
    train_diffusion,
)
from rayproj.runtime import interrupt


@dataclass
class Config:
    """One section for each stage; a stage is a job, and two stages may be the same job."""

    root: str = "runs/demo"
    import_data: import_data.Config = field(default_factory=import_data.Config)
    train_autoencoder: train_autoencoder.Config = field(default_factory=train_autoencoder.Config)
    encode_latents: encode_latents.Config = field(default_factory=encode_latents.Config)
    train_diffusion: train_diffusion.Config = field(default_factory=train_diffusion.Config)
    finetune_private: finetune_private.Config = field(default_factory=finetune_private.Config)
    generate_public: generate.Config = field(default_factory=generate.Config)
    generate_private: generate.Config = field(default_factory=generate.Config)
    classifier_real: train_classifier.Config = field(default_factory=train_classifier.Config)
    classifier_public: train_classifier.Config = field(default_factory=train_classifier.Config)
    classifier_private: train_classifier.Config = field(default_factory=train_classifier.Config)
    evaluate: evaluate.Config = field(default_factory=evaluate.Config)
    report: report.Config = field(default_factory=report.Config)


Stage = tuple[Callable[[Any], dict[str, Any]], Any]


def chain(config: Config) -> list[list[Stage]]:
    """The stages in order; those of one entry run at the same time."""
    return [
        [(import_data.main, config.import_data)],
        [(train_autoencoder.main, config.train_autoencoder)],
        [(encode_latents.main, config.encode_latents)],
        [(train_diffusion.main, config.train_diffusion)],
        [(generate.main, config.generate_public), (train_classifier.main, config.classifier_public)],
        [(finetune_private.main, config.finetune_private)],
        [(generate.main, config.generate_private), (train_classifier.main, config.classifier_private)],
        [(train_classifier.main, config.classifier_real)],
        [(evaluate.main, config.evaluate)],
        [(report.main, config.report)],
    ]


def main(config: Config) -> dict[str, Any]:
    """Run what is not done yet; returns the last stage's result, which names the report."""
    result: dict[str, Any] = {}
    for together in chain(config):
        with ThreadPoolExecutor(len(together)) as pool:
            running = [pool.submit(job, stage) for job, stage in together]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            failed = [future.exception() for future in done if future.exception()]
            if failed:
                interrupt.request()  # what waits for the failed stage would wait for ever
                raise failed[0]  # type: ignore[misc]
            result = running[-1].result()
    return result
