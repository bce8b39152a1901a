"""Train the autoencoder of the latent diffusion model on a rank group.

python jobs/train_autoencoder.py configs/train_autoencoder.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Header
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.diffusion.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderTask, measure
from rayproj.engine.steps import PlainStep, world_sizes
from rayproj.engine.training import Link, Recipe, TrainConfig, summary, train, whole_model
from rayproj.engine.world import World
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    data: str = "???"  # images to learn from: a dataset of jobs/import_data.py
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def task_of(config: Config, header: Header, shown: np.ndarray | None = None) -> AutoencoderTask:
    return AutoencoderTask(config.autoencoder, header.fields["image"].shape, config.run.seed, shown)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    dataset = Dataset.open(config.data)
    header, reader = dataset.header, Reader(dataset, fields=["image"])
    shown = reader.gather(np.arange(min(512, header.num_samples)))["image"]
    task = task_of(config, header, shown[:16])
    order = Shuffled(header.num_samples, header.shard_size, config.train.batch, config.run.seed)
    step = PlainStep(config.train.batch, config.train.micro_batch, world.world_size)
    recipe = Recipe(task, step, Batches(reader, order, world.rank, world.world_size), config.train)
    engine = train(recipe, world, Store(config.run.dir), link)
    model = whole_model(task, engine.averaged_weights(), world.device)
    assert isinstance(model, Autoencoder)
    measured = measure(model, torch.from_numpy(shown).to(world.device))
    if task.described.mean:  # denoisers of others know no other scale
        measured |= {"latent_mean": task.described.mean, "latent_std": task.described.std}
    shapes = {"image_shape": list(task.image_shape), "latent_shape": list(task.latent_shape)}
    return {**summary(engine, world), **measured, **shapes}


def main(config: Config) -> dict[str, Any]:
    with Run.open("train_autoencoder", config) as run:
        worlds = world_sizes(config.train.batch, config.train.micro_batch)
        return run.result or run.finish(fit(run, "rayproj.jobs.train_autoencoder:worker", config.cluster, worlds))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
