"""What the tests of failure discovery search: `rayproj.benchmarks.planted`, and a pool that is this process."""

from __future__ import annotations

from typing import Any

from rayproj.benchmarks.planted import LABELS, figures, train, write
from rayproj.data.dataset import Dataset
from rayproj.data.writer import commit_shard
from rayproj.runtime.group import import_entry

__all__ = ["LABELS", "figures", "make", "train", "write"]


def make(dataset: Dataset, maker: str, values: dict[str, Any], limit: int | None = None) -> None:
    """What the pool of a job does, in this process; at most so many shards."""
    missing = [shard for shard in range(dataset.header.num_shards) if dataset.record(shard) is None][:limit]
    own = import_entry(maker)(values, "cpu") if missing else None
    for shard in missing:
        commit_shard(dataset, shard, own.make(shard), "test", 0.0)  # type: ignore[union-attr]
