"""What the benchmarks of training train: a small class-conditional UNet on random latents."""

from __future__ import annotations

import numpy as np

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.diffusion.denoiser import DenoiserConfig
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask

CHANNELS = (32, 64)
LATENTS = Header(
    "benchmark", {"moments": Field("npy", (8, 8, 8)), "label": Field("int")}, 2048, 256, tuple("0123456789")
)


def task(channels: tuple[int, ...] = CHANNELS) -> DiffusionTask:
    return DiffusionTask(DiffusionConfig(latents="", denoiser=DenoiserConfig(channels=channels)), LATENTS, seed=0)


def write_latents(uri: str) -> Dataset:
    dataset = Dataset.create(uri, LATENTS)
    rng = np.random.default_rng(0)
    for shard in range(LATENTS.num_shards):
        samples = [
            {"key": f"{i:08d}", "moments": rng.normal(size=(8, 8, 8)).astype(np.float32), "label": i % 10}
            for i in LATENTS.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "benchmark", 0.0)
    return dataset
