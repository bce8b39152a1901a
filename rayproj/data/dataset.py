"""A dataset: webdataset tar shards plus commit records. Imported images, cached latents and synthetic images are all one.

<uri>/dataset.json             the header, created once
<uri>/shards/000000-<id>.tar   data under a unique name
<uri>/commits/000000.json      the record; a shard exists when and only when its record does
<uri>/weights.npy              how often each sample is to be drawn, fp32 [num_samples]; where it is not, all alike
<uri>/withheld/000000.json     of images that were drawn: how many for a shard did not pass safety rules, and why
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from rayproj.data.encodings import ENCODINGS, Encoding
from rayproj.errors import Interrupted, UserError
from rayproj.storage.store import Store, from_json, sha256_hex, to_json

WEIGHTS, WITHHELD = "weights.npy", "withheld"


@dataclass(frozen=True)
class Field:
    """One entry of a sample.

    Arrays of `shape` are in one of `rayproj.data.encodings`: "png", "webp" and "jpg" uint8 [C, H, W], "npy" and
    "safetensors" anything; "int", "float", "str": a scalar. An "int" may stand for one of `values`, and -1 for none.
    """

    encoding: str
    shape: tuple[int, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def array(self) -> Encoding | None:
        """The encoding of an array; None for a scalar."""
        return ENCODINGS.get(self.encoding)


@dataclass(frozen=True)
class Header:
    """What a dataset holds, fixed before its first shard."""

    name: str
    fields: dict[str, Field]
    num_samples: int
    shard_size: int  # samples in every shard but perhaps the last
    classes: tuple[str, ...]  # names of the values of the field "label"
    licence: str = ""
    attribution: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)  # how it was made
    # Of tars that others wrote: samples of each; and where fields are that are not in the member <key>.<field>.<encoding> or
    # under their name in the JSON: another member, or json.<name>.
    sizes: tuple[int, ...] = ()
    members: dict[str, str] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        return len(self.sizes) or math.ceil(self.num_samples / self.shard_size)

    def shard_range(self, shard: int) -> range:
        """Global indices of the samples of a shard."""
        if self.sizes:
            start = sum(self.sizes[:shard])
            return range(start, start + self.sizes[shard])
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_samples))

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sample, and its place there."""
        if not self.sizes:
            return np.divmod(indices, self.shard_size)
        ends = np.cumsum(self.sizes)
        shards = np.searchsorted(ends, indices, side="right")
        return shards, indices - (ends - self.sizes)[shards]

    def values_of(self, name: str) -> tuple[str, ...]:
        """What the numbers of a field stand for."""
        return self.classes if name == "label" else self.fields[name].values

    def only(self, *names: str) -> Header:
        """With these fields alone, as far as there are any."""
        return replace(self, fields={name: field for name, field in self.fields.items() if name in names})

    def to_json(self) -> bytes:
        values = asdict(self)
        return to_json({n: v for n, v in values.items() if v or n not in ("sizes", "members")})

    @classmethod
    def from_json(cls, data: bytes) -> Header:
        values = from_json(data)
        values["fields"] = {
            k: Field(f["encoding"], tuple(f["shape"]), tuple(f.get("values", ()))) for k, f in values["fields"].items()
        }
        values["classes"], values["sizes"] = tuple(values["classes"]), tuple(values.get("sizes", ()))
        return cls(**values)


@dataclass(frozen=True)
class ShardRecord:
    """A committed shard."""

    shard: int
    object: str  # path of the tar, relative to the dataset
    sha256: str
    size: int  # bytes
    samples: int
    class_counts: dict[str, int]
    made_by: str  # the actor or process
    seconds: float  # it took to make
    committed_at: float  # unix time

    @classmethod
    def from_json(cls, data: bytes) -> ShardRecord:
        return cls(**from_json(data))


class Inputs:
    """Headers of datasets that may not be there yet, for planning.

    Args:
        assumed: stands in for every header that is not there; None: an empty header does.

    Attributes:
        missing: what was not there.
    """

    def __init__(self, assumed: Header | None = None) -> None:
        self.assumed, self.missing = assumed, list[str]()

    def header(self, uri: str, read: Callable[[], Header] | None = None) -> Header:
        """The header at a URI, or what `read` makes of what is there."""
        try:
            return read() if read else Dataset.open(uri).header
        except (UserError, FileNotFoundError):
            return self.absent(uri)

    def absent(self, uri: str) -> Header:
        """What stands in for the header of what is not there."""
        self.missing.append(uri)
        return self.assumed or Header("", {}, 0, 1, ())


class Dataset:
    """A dataset on a store, complete or still being written."""

    def __init__(self, uri: str, header: Header) -> None:
        self.store = Store(uri)
        self.uri = self.store.uri
        self.header = header
        self._records: dict[int, ShardRecord] = {}

    @classmethod
    def create(cls, uri: str, header: Header) -> Dataset:
        """Plan a dataset, or open one that has the same plan.

        Raises:
            UserError: another dataset is there, or a damaged one.
        """
        store = Store(uri)
        if not store.put_once("dataset.json", header.to_json()):
            there = store.parsed("dataset.json", Header.from_json)
            if there.to_json() != header.to_json():
                ours, theirs = asdict(header), asdict(there)
                differing = ", ".join(sorted(k for k in ours if to_json(ours[k]) != to_json(theirs[k])))
                raise UserError(
                    f"{store.uri} already holds another dataset (it differs in {differing}); "
                    "write to another place or delete that folder."
                )
        return cls(uri, header)

    @classmethod
    def open(cls, uri: str, wait_seconds: float = 0.0, stop: Callable[[], bool] = lambda: False) -> Dataset:
        """Open a dataset, waiting for its header if it is not there yet; `stop` ends the wait with Interrupted.

        Raises:
            UserError: there is none after waiting, or its header is damaged.
        """
        store, deadline = Store(uri), time.monotonic() + wait_seconds
        while True:
            try:
                return cls(uri, store.parsed("dataset.json", Header.from_json))
            except FileNotFoundError:
                if stop():
                    raise Interrupted from None
                if time.monotonic() >= deadline:
                    raise UserError(f"There is no dataset at '{uri}'; run the job that writes it first.") from None
                time.sleep(min(0.2, wait_seconds))

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a committed shard, or None. A record never changes, so it is read once.

        Raises:
            UserError: it is damaged.
        """
        if shard not in self._records:
            try:
                self._records[shard] = self.store.parsed(f"commits/{shard:06d}.json", ShardRecord.from_json)
            except FileNotFoundError:
                return None
        return self._records[shard]

    def records(self) -> dict[int, ShardRecord]:
        """Every committed shard's record, by shard."""
        if len(self._records) < self.header.num_shards:
            for shard in self.committed():
                self.record(shard)
        return dict(sorted(self._records.items()))

    def committed(self) -> list[int]:
        """The shards that have a record, sound or not."""
        return [int(path.removeprefix("commits/").removesuffix(".json")) for path in self.store.list("commits")]

    def orphans(self) -> list[str]:
        """Data of shards that were never committed: somebody died, or writes just now."""
        held = {record.object for record in self.records().values()}
        return [path for path in self.store.list("shards") if path not in held]

    @property
    def complete(self) -> bool:
        return len(self.records()) == self.header.num_shards

    @property
    def without_label(self) -> int:
        """Samples in committed shards that are of no class."""
        return sum(record.samples - sum(record.class_counts.values()) for record in self.records().values())

    def weights(self) -> np.ndarray | None:
        """How often each sample is to be drawn, fp32 [num_samples]; None for all alike."""
        if not self.store.exists(WEIGHTS):
            return None
        return np.asarray(np.load(io.BytesIO(self.store.read(WEIGHTS)), allow_pickle=False))

    def beside(self) -> dict[str, str]:
        """What else says something of the samples, `manifest_hash` not included: path -> SHA-256."""
        paths = [WEIGHTS] * self.store.exists(WEIGHTS) + self.store.list(WITHHELD)
        return {path: sha256_hex(self.store.read(path)) for path in paths}

    def manifest_hash(self) -> str:
        """Identifies the contents: header and shard hashes.

        Raises:
            UserError: shards are missing.
        """
        records = self.records()
        if not self.complete:
            raise UserError(f"{self.uri} has {len(records)} of {self.header.num_shards} shards; finish writing it.")
        contents = [[r.shard, r.sha256, r.samples] for r in records.values()]
        return hashlib.sha256(self.header.to_json() + to_json(contents)).hexdigest()
