"""This rank's slices of the global batches, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rayproj.data import watermark
from rayproj.data.dataset import Dataset
from rayproj.data.order import Buckets, Mixed, order_of
from rayproj.data.reader import Gathering, Joined, Reader


class Sampling(Protocol):
    """Which samples make up the global batch of a step."""

    def indices(self, step: int) -> np.ndarray: ...


class Ordered(Sampling, Protocol):
    def position(self, step: int) -> int:
        """Samples read before a step."""
        ...


class Batches:
    """Batch by step: the samples of `sampling.indices(step)`, of which this rank takes its contiguous share.

    The next step's batch is read ahead in a thread, where there is a GPU into pinned memory, from which it is copied while
    the GPU works.
    """

    def __init__(self, reader: Gathering, sampling: Sampling, rank: int, world_size: int) -> None:
        self.reader, self.sampling, self.rank, self.world_size = reader, sampling, rank, world_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def at(self, step: int) -> dict[str, Tensor]:
        """The fields [B, ...] of this rank's share, and "row" int64 [B, 3]: (global sample index, step, view 0)."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._pool.submit(self._read, step))
        batch = self._ahead[1].result()
        self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        return batch

    def _read(self, step: int) -> dict[str, Tensor]:
        mine = np.array_split(self.sampling.indices(step), self.world_size)[self.rank]
        columns = self.reader.gather(mine)
        index = torch.from_numpy(columns.pop("index"))
        row = torch.stack([index, torch.full_like(index, step), torch.zeros_like(index)], dim=1)
        batch = {"row": row, **{k: torch.from_numpy(v) for k, v in columns.items() if v.dtype != object}}
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch


def pooled(
    datasets: Sequence[Dataset], fields: list[str], batch: int, seed: int, rank: int, world_size: int
) -> Batches:
    """Batches of all samples of some datasets together, each of which has its share of every batch.

    Raises:
        UserError: their classes or the shapes of a field differ.
    """
    readers = [Reader(dataset, fields) for dataset in datasets]
    orders = [order_of(dataset, batch, seed) for dataset in datasets]
    if len(datasets) == 1:
        return Batches(readers[0], orders[0], rank, world_size)
    sizes = np.array([order.num_samples for order in orders])
    return Batches(Joined(readers), Mixed(orders, sizes / sizes.sum(), batch, seed), rank, world_size)


class Bucketed:
    """Batches of one dataset of several in each step."""

    def __init__(self, parts: Sequence[Batches], buckets: Buckets) -> None:
        self.parts, self.buckets = parts, buckets

    def at(self, step: int) -> dict[str, Tensor]:
        """As `Batches.at`, with the step of the training in "row"."""
        bucket, number = self.buckets.at(step)
        batch = self.parts[bucket].at(number)
        batch["row"][:, 1] = step
        return batch


class Streamed:
    """Batches of a dataset in the making, whose first epoch is in order: tells the producer how far that was read. Of
    several datasets that are mixed, it is the first."""

    def __init__(self, batches: Batches, order: Ordered, dataset: Dataset, consumer: str) -> None:
        self.batches, self.order, self.dataset, self.consumer = batches, order, dataset, consumer
        self._told = -1

    def at(self, step: int) -> dict[str, Tensor]:
        header, position = self.dataset.header, self.order.position(step)
        self._tell(header.num_shards if position >= header.num_samples else position // header.shard_size)
        return self.batches.at(step)

    def finish(self) -> None:
        """Nothing more will be read: the producer need not wait."""
        self._tell(self.dataset.header.num_shards)

    def _tell(self, shards: int) -> None:
        if shards > self._told and self.batches.rank == 0:
            watermark.publish(self.dataset, self.consumer, shards)
        self._told = max(shards, self._told)
