"""A small dataset of latents that no autoencoder made, for tests of jobs that train on them."""

from __future__ import annotations

import numpy as np

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard

DENOISER = {"channels": [8, 16], "head_dim": 8, "norm_groups": 4}  # for them


def write(uri: str, num_samples: int = 50, shard_size: int = 25) -> Dataset:
    fields = {"moments": Field("npy", (8, 4, 4)), "label": Field("int")}
    dataset = Dataset.create(uri, Header("latents", fields, num_samples, shard_size, ("a", "b", "c")))
    rng = np.random.default_rng(0)
    for shard in range(dataset.header.num_shards):
        samples = [
            {"key": f"{i:08d}", "label": i % 3, "moments": rng.normal(size=(8, 4, 4)).astype(np.float32)}
            for i in dataset.header.shard_range(shard)
        ]
        assert commit_shard(dataset, shard, samples, "test", 0.1)
    return dataset
