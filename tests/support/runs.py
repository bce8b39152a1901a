"""The runs of an autoencoder and of a denoiser, and the latents between them, as the jobs write them but without Ray."""

from __future__ import annotations

from typing import Any

import yaml

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.autoencoder import AutoencoderConfig, AutoencoderTask
from rayproj.diffusion.encode import Encoder, latent_header, text_encoder
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.diffusion.text import TextConfig
from rayproj.engine.steps import PlainStep
from rayproj.engine.training import Recipe, TrainConfig, train
from rayproj.engine.world import World
from rayproj.storage.store import Store, to_json
from tests.support.regression import Recorder

BATCH = 4


def autoencoder(world: World, uri: str, images: Dataset, config: dict[str, Any], steps: int = 2) -> Store:
    """A run of jobs/train_autoencoder.py, whose latents are scaled by 1, or as others' weights say."""
    task = AutoencoderTask(
        configuration.from_dict(AutoencoderConfig, config), images.header.fields["image"].shape, seed=0
    )
    store = _trained(world, uri, task, images, ["image"], TrainConfig(steps=steps, batch=BATCH))
    store.put_once("config.yaml", yaml.safe_dump({"autoencoder": config, "data": images.uri}).encode())
    channels = task.latent_shape[0]
    scale = {
        "latent_mean": task.described.mean or [0.0] * channels,
        "latent_std": task.described.std or [1.0] * channels,
    }
    shapes = {"image_shape": list(task.image_shape), "latent_shape": list(task.latent_shape)}
    store.put_once("result.json", to_json({**shapes, **scale}))
    return store


def latents(
    uri: str,
    images: Dataset,
    autoencoder: Store,
    text: dict[str, Any] | None = None,
    properties: dict[str, list[str]] | None = None,
    low: int = 0,
    encoding: str = "npy",
) -> Dataset:
    """What jobs/encode_latents.py writes."""
    asked = {"text": text or {}, "properties": properties or {}, "low": low}
    encoder = text_encoder(configuration.from_dict(TextConfig, asked["text"]), "cpu")
    dataset = Dataset.create(
        uri, latent_header(images.header, autoencoder.uri, asked["properties"], encoder, asked["low"], encoding)
    )
    maker = Encoder({"images": images.uri, "autoencoder": autoencoder.uri, "batch": BATCH, **asked}, "cpu")
    for shard in range(dataset.header.num_shards):
        commit_shard(dataset, shard, maker.make(shard), "test", 0.1)
    return dataset


def denoiser(world: World, uri: str, latents: Dataset, config: dict[str, Any], lr: float = 3e-4) -> Store:
    """A run of jobs/train_diffusion.py, of two steps."""
    values = {"latents": latents.uri, "init": "", **config}
    task = DiffusionTask(configuration.from_dict(DiffusionConfig, values), latents.header, seed=0)
    settings = TrainConfig(steps=2, batch=BATCH)
    settings.engine.optimizer.lr = lr
    store = _trained(world, uri, task, latents, task.fields, settings)
    store.put_once("config.yaml", yaml.safe_dump({"diffusion": values, "train": {"steps": 2}}).encode())
    return store


def _trained(world: World, uri: str, task: Any, dataset: Dataset, fields: list[str], settings: TrainConfig) -> Store:
    store, header = Store(uri), dataset.header
    order = Shuffled(header.num_samples, header.shard_size, BATCH, seed=0)
    batches = Batches(Reader(dataset, fields), order, world.rank, world.world_size)
    train(Recipe(task, PlainStep(BATCH, 0, world.world_size), batches, settings), world, store, Recorder("a"))
    return store
