"""Small image datasets for tests."""

from __future__ import annotations

import numpy as np

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard


def header(num_samples: int = 50, shard_size: int = 16, name: str = "test") -> Header:
    return Header(
        name=name,
        fields={
            "image": Field("png", (1, 8, 8)),
            "label": Field("int"),
            "note": Field("str"),
            "z": Field("npy", (2, 3)),
        },
        num_samples=num_samples,
        shard_size=shard_size,
        classes=("a", "b", "c"),
    )


def sample(index: int) -> dict:
    rng = np.random.default_rng(index)
    return {
        "key": f"{index:08d}",
        "image": rng.integers(0, 256, (1, 8, 8), dtype=np.uint8),
        "label": index % 3,
        "note": f"sample {index} ε",
        "z": rng.normal(size=(2, 3)).astype(np.float32),
    }


def commit(dataset: Dataset, shard: int) -> bool:
    return commit_shard(dataset, shard, [sample(i) for i in dataset.header.shard_range(shard)], "test", 0.1)


def write(uri: str, num_samples: int = 50, shard_size: int = 16) -> Dataset:
    dataset = Dataset.create(uri, header(num_samples, shard_size))
    for shard in range(dataset.header.num_shards):
        assert commit(dataset, shard)
    return dataset
