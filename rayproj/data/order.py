"""Which samples make up which global batch: pure functions of the step. No state, so nothing to save or restore."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rayproj.data.dataset import Dataset

AHEAD = 256  # steps that `Mixed` counts at a time


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, shard_size: int, seed: int, epoch: int, window_shards: int = 8) -> np.ndarray:
    """A keyed permutation of a dataset: shards permuted, then samples permuted within windows of shards.

    Windows keep reads local: only `window_shards` shards are open at a time.

    Returns:
        int64 [num_samples] of global sample indices.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    num_shards = -(-num_samples // shard_size)
    shards = rng.permutation(num_shards)
    windows = []
    for begin in range(0, num_shards, window_shards):
        starts = shards[begin : begin + window_shards] * shard_size
        inside = (starts[:, None] + np.arange(shard_size)).ravel()
        windows.append(rng.permutation(inside[inside < num_samples]))
    order = np.concatenate(windows).astype(np.int64)
    order.flags.writeable = False
    return order


class Shuffled:
    """Global batch b is positions [bB, (b+1)B) of the endless stream of permuted epochs.

    Args:
        global_batch: B, over all ranks.
        first_epoch_in_order: the first epoch takes the samples in order, as for a dataset that is still being written.
    """

    def __init__(
        self, num_samples: int, shard_size: int, global_batch: int, seed: int, first_epoch_in_order: bool = False
    ) -> None:
        self.num_samples, self.shard_size, self.global_batch, self.seed = num_samples, shard_size, global_batch, seed
        self.first_epoch_in_order = first_epoch_in_order

    def indices(self, step: int) -> np.ndarray:
        """int64 [B]: global sample indices of the batch of update `step`."""
        return self.stream(step * self.global_batch, (step + 1) * self.global_batch)

    def stream(self, start: int, stop: int) -> np.ndarray:
        """int64: global sample indices of these positions of the stream."""
        epochs, offsets = np.divmod(np.arange(start, stop, dtype=np.int64), self.num_samples)
        parts = [self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def position(self, step: int) -> int:
        """Samples read before update `step`."""
        return step * self.global_batch

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch == 0 and self.first_epoch_in_order:
            return np.arange(self.num_samples)
        return epoch_order(self.num_samples, self.shard_size, self.seed, epoch)


class Weighted(Shuffled):
    """As `Shuffled`, with samples drawn as often as their weights say.

    An epoch has as many places as there are samples, of which sample i has N wᵢ/Σw, rounded up or down so that its mean over
    the epochs is that (systematic resampling).

    Args:
        weights: float [num_samples], not negative.
    """

    def __init__(
        self, weights: np.ndarray, shard_size: int, global_batch: int, seed: int, window_shards: int = 8
    ) -> None:
        self.ends = np.cumsum(weights, dtype=np.float64)
        assert self.ends[-1] > 0, "no sample has any weight"
        super().__init__(len(weights), shard_size, global_batch, seed)
        self.window_shards = window_shards
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._held[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            places = (np.arange(self.num_samples) + rng.random()) * (self.ends[-1] / self.num_samples)
            # By rounding the last place can come out at the very end.
            drawn = np.searchsorted(self.ends, places, side="right").clip(max=self.num_samples - 1)
            place_of_shard = rng.permutation(-(-self.num_samples // self.shard_size))
            window = place_of_shard[drawn // self.shard_size] // self.window_shards
            self._held = epoch, drawn[np.lexsort((rng.random(len(drawn)), window))]
        return self._held[1]


class Buckets:
    """Which of several datasets, of images of different shapes, a step's batch is from: all of it, so that every rank has as
    much to do as the others.

    In each run of as many steps as the samples fill, a dataset has its share, rounded up or down so that its mean is exact,
    in a keyed order.

    Args:
        sizes: samples of each.
    """

    def __init__(self, sizes: Sequence[int], global_batch: int, seed: int) -> None:
        self.ends, self.seed = np.cumsum(sizes) / sum(sizes), seed
        self.round = -(-sum(sizes) // global_batch)
        self._drawn = np.empty(0, np.int64)

    def at(self, step: int) -> tuple[int, int]:
        """The dataset of update `step`, and how many steps before it were from the same."""
        while step >= len(self._drawn):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, len(self._drawn) // self.round]))
            places = (np.arange(self.round) + rng.random()) / self.round
            drawn = rng.permutation(np.searchsorted(self.ends, places, side="right").clip(max=len(self.ends) - 1))
            self._drawn = np.concatenate([self._drawn, drawn])
        bucket = int(self._drawn[step])
        return bucket, int((self._drawn[:step] == bucket).sum())


class Mixed:
    """Batches of several datasets, each with a position of its own, in given shares.

    A batch has B sᵢ samples of dataset i, rounded up or down so that the mean is exact, in a keyed order.

    Args:
        orders: of the datasets.
        shares: sᵢ, positive, summing to 1.
    """

    def __init__(self, orders: Sequence[Shuffled], shares: Sequence[float], global_batch: int, seed: int) -> None:
        self.orders, self.ends, self.global_batch, self.seed = orders, np.cumsum(shares), global_batch, seed
        self.starts = np.cumsum([0, *(order.num_samples for order in orders)])
        self._taken = np.zeros((1, len(orders)), np.int64)  # before each step, as far as it was asked for

    def indices(self, step: int) -> np.ndarray:
        """int64 [B]: of the samples of all datasets in a row."""
        before, after = self.taken(step), self.taken(step + 1)
        parts = [order.stream(a, b) for order, a, b in zip(self.orders, before, after, strict=True)]
        whole = np.concatenate([part + start for part, start in zip(parts, self.starts, strict=False)])
        return np.random.Generator(np.random.Philox(key=[self.seed, step])).permutation(whole)

    def taken(self, step: int) -> np.ndarray:
        """int64 [datasets]: samples of each that were read before update `step`."""
        while step >= len(self._taken):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, 2**32 + len(self._taken)]))
            places = (np.arange(self.global_batch) + rng.random((AHEAD, 1))) / self.global_batch
            chosen = np.searchsorted(self.ends, places, side="right").clip(max=len(self.ends) - 1)
            counts = np.stack([(chosen == i).sum(1) for i in range(len(self.ends))], 1)
            self._taken = np.concatenate([self._taken, self._taken[-1] + np.cumsum(counts, 0)])
        return self._taken[step]

    def position(self, step: int) -> int:
        """Samples of the first dataset read before update `step`."""
        return int(self.taken(step)[0])


def order_of(dataset: Dataset, global_batch: int, seed: int) -> Shuffled:
    """By weight if there are weights."""
    weights, header = dataset.weights(), dataset.header
    if weights is None:
        return Shuffled(header.num_samples, header.shard_size, global_batch, seed)
    return Weighted(weights, header.shard_size, global_batch, seed)
