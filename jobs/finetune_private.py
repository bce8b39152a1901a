"""Fine-tune a diffusion model on private images with DP-SGD.

python jobs/finetune_private.py configs/finetune_private.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.data.loader import Batches
from rayproj.data.reader import Reader
from rayproj.diffusion.autoencoder import Codec
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.training import Link, Recipe, TrainConfig, summary, train
from rayproj.engine.world import World
from rayproj.privacy.ledger import secret_key
from rayproj.privacy.plan import PrivacyConfig, plan
from rayproj.privacy.sampling import PoissonSampling
from rayproj.privacy.step import PrivateStep
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("finetune_private", config) as run:
        return run.result or run.finish(fit(run, "rayproj.jobs.finetune_private:worker", config.cluster))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
