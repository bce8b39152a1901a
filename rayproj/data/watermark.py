"""How far the consumers of a dataset in the making have read."""

from __future__ import annotations

from rayproj.data.dataset import Dataset
from rayproj.storage.store import from_json, to_json


def publish(dataset: Dataset, consumer: str, shards: int) -> None:
    """Say that a consumer is through with the first `shards` shards."""
    dataset.store.write(f"consumers/{consumer}.json", to_json({"shards": shards}))


def watermarks(dataset: Dataset) -> dict[str, int]:
    """Shards that each consumer is through with, by its name."""
    paths = dataset.store.list("consumers")
    names = (path.removeprefix("consumers/").removesuffix(".json") for path in paths)
    return {name: int(from_json(dataset.store.read(f"consumers/{name}.json"))["shards"]) for name in names}
