"""Samples of a dataset by their global indices."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import RLock
from typing import Any, Protocol

import numpy as np

from rayproj.data.cache import NodeCache
from rayproj.data.dataset import Dataset, Header
from rayproj.errors import Interrupted, UserError
from rayproj.storage.store import IntegrityError, sha256_hex

Columns = dict[str, np.ndarray]


class ShardTimeout(TimeoutError):
    """A shard was not committed in time."""


def key_of(member: str) -> tuple[str, str]:
    """The sample that a member of a tar belongs to, and what of it: cut at the first dot behind the last slash, as
    webdataset does."""
    folder, slash, name = member.rpartition("/")
    base, _, extension = name.partition(".")
    return folder + slash + base, extension


def number(header: Header, field: str, value: Any) -> Any:
    """A scalar as it is read: of an integer field that is written as a name, the name's number.

    Raises:
        ValueError: it is neither.
    """
    if header.fields[field].encoding != "int" or not isinstance(value, str):
        return value
    names = header.values_of(field)
    return names.index(value) if value in names else int(value)


class Gathering(Protocol):
    """Samples by index."""

    def gather(self, indices: np.ndarray) -> Columns: ...


class Reader:
    """Random access to a dataset, complete or still being written.

    A shard is fetched once, checked against its hash and decoded whole; decoded shards stay in memory up to a bound,
    the least recently used going first. A shard that is not committed yet is waited for. Shards of a far store are kept on
    this machine's disk where there is a `NodeCache`.

    Args:
        fields: which fields to decode; None for all.
        cache_bytes: bound on the decoded shards kept.
        wait_seconds: how long to wait for a shard.
        stop: asked while waiting; True ends the wait with Interrupted.
        threads: that decode a shard's arrays.
    """

    def __init__(
        self,
        dataset: Dataset,
        fields: list[str] | None = None,
        cache_bytes: int = 1 << 30,
        wait_seconds: float = 600.0,
        stop: Callable[[], bool] = lambda: False,
        threads: int = 2,
    ) -> None:
        self.disk = None if dataset.store.local_path() else NodeCache.of_environment()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.dataset = dataset
        self.fields = list(dataset.header.fields) if fields is None else fields
        self.cache_bytes, self.wait_seconds, self.stop = cache_bytes, wait_seconds, stop
        self._cache: OrderedDict[int, Columns] = OrderedDict()
        self._lock = RLock()

    def gather(self, indices: np.ndarray) -> Columns:
        """The samples of these global indices, stacked by field: images uint8 [B, C, H, W], numbers [B], strings as
        objects; and "index", int64 [B].

        Raises:
            ShardTimeout: a shard was not committed in `wait_seconds`.
            IntegrityError: a shard's bytes are not what its record says, or a member is missing or does not decode.
        """
        indices = np.asarray(indices, dtype=np.int64)
        shards, offsets = self.dataset.header.places(indices)
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
        scalars = {"int": np.int64, "float": np.float64, "str": object}
        return np.empty((size, *field.shape), field.array.dtype if field.array else scalars[field.encoding])

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
        fetch = partial(self.dataset.store.read, record.object)
        data = self.disk.get(record.sha256, fetch) if self.disk else fetch()
        if sha256_hex(data) != record.sha256:
            raise IntegrityError(f"Shard {shard} of {self.dataset.uri} ({record.object}) is damaged: another hash.")
        return data

    def _decode(self, shard: int) -> Columns:
        header = self.dataset.header
        count = len(header.shard_range(shard))
        columns = {name: self._empty(name, count) for name in self.fields}
        arrays = {n: array for n in self.fields if (array := header.fields[n].array)}
        where = {n: f"{n}.{header.fields[n].encoding}" if n in arrays else f"json.{n}" for n in self.fields}
        where |= {n: place for n, place in header.members.items() if n in where}
        scalars = {n: place[5:] for n, place in where.items() if place.startswith("json.")}
        members = {place: n for n, place in where.items() if n not in scalars}
        wanted = {*members, *(["json"] if scalars else [])}
        skipped = header.provenance.get("skipped", {}).get(str(shard), {})
        found: list[tuple[str, str, int, bytes]] = []
        position, key = -1, ""
        with tarfile.open(fileobj=io.BytesIO(self._fetch(shard))) as tar:
            for member in tar:
                base, extension = key_of(member.name)
                if base in skipped or not member.isfile():
                    continue
                if base != key:
                    position, key = position + 1, base
                if extension in wanted:
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append((member.name, extension, position, file.read()))

        def decode(run: list[tuple[str, str, int, bytes]]) -> None:
            for name, extension, position, data in run:
                try:
                    if extension == "json":
                        values = json.loads(data)
                        for scalar, written in scalars.items():
                            columns[scalar][position] = number(header, scalar, values[written])
                    elif (field := members[extension]) not in arrays:
                        columns[field][position] = number(header, field, data.decode().strip())
                    else:
                        array, shape = arrays[field].decode(data), header.fields[field].shape
                        # A WebP has three channels also where the image has one.
                        columns[field][position] = array[: shape[0]] if arrays[field].image else array
                except (ValueError, KeyError, OSError, IndexError) as error:
                    raise IntegrityError(
                        f"In shard {shard} of {self.dataset.uri} the member '{name}' does not decode: {error}"
                    ) from error

        if len(found) != count * len(wanted):
            raise IntegrityError(
                f"Shard {shard} of {self.dataset.uri} lacks members: {len(found)} read for {count} samples."
            )
        # In runs, since a small image takes less time than a thread to be told of it.
        list(self._threads.map(decode, [found[i : i + 32] for i in range(0, len(found), 32)]))
        return columns


class Joined:
    """The samples of several datasets in a row.

    Raises:
        UserError: their classes or the shapes of a field differ.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        first = readers[0].dataset
        for reader in readers[1:]:
            header = reader.dataset.header
            for name in readers[0].fields:
                if header.fields.get(name) != first.header.fields[name] or header.classes != first.header.classes:
                    raise UserError(
                        f"{reader.dataset.uri} and {first.uri} cannot be mixed: their classes or their fields '{name}' "
                        "differ."
                    )
        self.starts = np.cumsum([0, *(reader.dataset.header.num_samples for reader in readers)])

    def gather(self, indices: np.ndarray) -> Columns:
        """As `Reader.gather`."""
        indices = np.asarray(indices, dtype=np.int64)
        which, columns = np.searchsorted(self.starts, indices, side="right") - 1, Columns()
        for number in np.unique(which):
            chosen = np.flatnonzero(which == number)
            for name, part in self.readers[number].gather(indices[chosen] - self.starts[number]).items():
                columns.setdefault(name, np.empty((len(indices), *part.shape[1:]), part.dtype))[chosen] = part
        return {**columns, "index": indices}


def _bytes(columns: Columns) -> int:
    return sum(array.nbytes for array in columns.values())
