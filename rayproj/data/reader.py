"""Samples of a dataset by their global indices."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import RLock

import numpy as np
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.errors import Interrupted
from rayproj.storage.store import IntegrityError, sha256_hex

Columns = dict[str, np.ndarray]


class ShardTimeout(TimeoutError):
    """A shard was not committed in time."""


def decode_png(data: bytes) -> np.ndarray:
    """uint8 [C, H, W]."""
    array = np.asarray(Image.open(io.BytesIO(data)))
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


class Reader:
    """Random access to a dataset, complete or still being written.

    A shard is fetched once, checked against its hash and decoded whole; decoded shards stay in memory up to a bound,
    the least recently used going first. A shard that is not committed yet is waited for.

    Args:
        fields: which fields to decode; None for all.
        cache_bytes: bound on the decoded shards kept.
        wait_seconds: how long to wait for a shard.
        stop: asked while waiting; True ends the wait with Interrupted.
    """

    def __init__(
        self,
        dataset: Dataset,
        fields: list[str] | None = None,
        cache_bytes: int = 1 << 30,
        wait_seconds: float = 600.0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.dataset = dataset
        self.fields = list(dataset.header.fields) if fields is None else fields
        self.cache_bytes, self.wait_seconds, self.stop = cache_bytes, wait_seconds, stop
        self._cache: OrderedDict[int, Columns] = OrderedDict()
        self._lock = RLock()

    def gather(self, indices: np.ndarray) -> Columns:
        """The samples of these global indices, stacked by field: "png" fields uint8 [B, C, H, W], numbers [B], strings
        as objects; and "index", int64 [B].

        Raises:
            ShardTimeout: a shard was not committed in `wait_seconds`.
            IntegrityError: a shard's bytes are not what its record says, or a member is missing or does not decode.
        """
        indices = np.asarray(indices, dtype=np.int64)
        shards, offsets = np.divmod(indices, self.dataset.header.shard_size)
        result = {name: self._empty(name, len(indices)) for name in self.fields}
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            columns = self.shard(int(shard))
            for name in self.fields:
                result[name][chosen] = columns[name][offsets[chosen]]
        return {**result, "index": indices}

    def shard(self, shard: int) -> Columns:
        """All samples of one shard, decoded."""
        with self._lock:
            if shard in self._cache:
                self._cache.move_to_end(shard)
                return self._cache[shard]
            columns = self._decode(shard)
            self._cache[shard] = columns
            while len(self._cache) > 1 and sum(map(_bytes, self._cache.values())) > self.cache_bytes:
                self._cache.popitem(last=False)
            return columns

    def _empty(self, name: str, size: int) -> np.ndarray:
        field = self.dataset.header.fields[name]
        dtype = {"png": np.uint8, "npy": np.float32, "int": np.int64, "float": np.float64, "str": object}
        return np.empty((size, *field.shape), dtype[field.encoding])

    def _fetch(self, shard: int) -> bytes:
        deadline, pause = time.monotonic() + self.wait_seconds, 0.02
        while (record := self.dataset.record(shard)) is None:
            if self.stop():
                raise Interrupted
            if time.monotonic() >= deadline:
                raise ShardTimeout(
                    f"Shard {shard} of {self.dataset.uri} was not committed within {self.wait_seconds:g} s; "
                    "see whether the job that writes it still runs."
                )
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        data = self.dataset.store.read(record.object)
        if sha256_hex(data) != record.sha256:
            raise IntegrityError(f"Shard {shard} of {self.dataset.uri} ({record.object}) is damaged: another hash.")
        return data

    def _decode(self, shard: int) -> Columns:
        header = self.dataset.header
        count = len(header.shard_range(shard))
        columns = {name: self._empty(name, count) for name in self.fields}
        scalars = [n for n in self.fields if header.fields[n].encoding not in ("png", "npy")]
        decoders = {f"{n}.{header.fields[n].encoding}": n for n in self.fields if n not in scalars}
        position, key, seen = -1, "", 0
        with tarfile.open(fileobj=io.BytesIO(self._fetch(shard))) as tar:
            for member in tar:
                base, _, extension = member.name.partition(".")
                if base != key:
                    position, key = position + 1, base
                file = tar.extractfile(member)
                assert file is not None
                try:
                    if extension == "json":
                        values = json.loads(file.read())
                        for name in scalars:
                            columns[name][position] = values[name]
                        seen += 1
                    elif extension in decoders:
                        decode = decode_png if extension.endswith("png") else _decode_npy
                        columns[decoders[extension]][position] = decode(file.read())
                        seen += 1
                except (ValueError, KeyError, OSError, IndexError) as error:
                    raise IntegrityError(
                        f"In shard {shard} of {self.dataset.uri} the member '{member.name}' does not decode: {error}"
                    ) from error
        if seen != count * (len(decoders) + 1):
            raise IntegrityError(f"Shard {shard} of {self.dataset.uri} lacks members: {seen} read for {count} samples.")
        return columns


def _decode_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _bytes(columns: Columns) -> int:
    return sum(array.nbytes for array in columns.values())
