"""Samples to a tar in memory, and the tar to a committed shard."""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import webdataset

from rayproj import faults
from rayproj.data.dataset import Dataset, ShardRecord
from rayproj.data.encodings import ENCODINGS
from rayproj.storage.store import sha256_hex, to_json

Sample = dict[str, Any]
"""{"key": str, field: value, ...}; arrays are members of their own, scalars go into one of JSON."""


def build_tar(samples: Iterable[Sample], encodings: dict[str, str]) -> bytes:
    """A webdataset tar: equal samples give equal bytes.

    Args:
        encodings: of each field, as in `Field.encoding`; scalars of a sample go together into `<key>.json`.

    Raises:
        ValueError: a key that webdataset would split at a dot or read as a folder.
    """
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, encoder=False, mtime=0, user="rayproj", group="rayproj")
    for sample in samples:
        key = sample["key"]
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", key):
            raise ValueError(f"The sample key {key!r} may only have letters, digits, '_' and '-'.")
        members: dict[str, Any] = {"__key__": key}
        scalars: dict[str, Any] = {}
        for name, encoding in encodings.items():
            if encoding in ENCODINGS:
                members[f"{name}.{encoding}"] = ENCODINGS[encoding].encode(sample[name])
            else:
                scalars[name] = sample[name]
        members["json"] = json.dumps(scalars, sort_keys=True, ensure_ascii=False).encode()
        writer.write(members)
    writer.close()
    return buffer.getvalue()


def commit_shard(dataset: Dataset, shard: int, samples: list[Sample], made_by: str, seconds: float) -> bool:
    """Write a shard and commit it, once.

    The data go under a unique name; the shard exists from the moment its record is created. A process that dies in
    between leaves data that nobody reads.

    Args:
        made_by: who made it, for the record.
        seconds: how long it took to make.

    Returns:
        False if somebody else had committed this shard; our data are deleted.
    """
    header = dataset.header
    planned = len(header.shard_range(shard))
    assert len(samples) == planned, f"shard {shard} has {len(samples)} samples, the plan says {planned}"
    data = build_tar(samples, {name: f.encoding for name, f in header.fields.items()})
    path = f"shards/{shard:06d}-{uuid.uuid4().hex[:8]}.tar"
    faults.maybe("shard.before_data")
    assert dataset.store.put_once(path, data), f"{path} exists"
    faults.maybe("shard.before_commit")
    labels = [int(s["label"]) for s in samples] if "label" in header.fields else []
    counts = Counter(header.classes[label] for label in labels if label >= 0)
    record = ShardRecord(
        shard=shard,
        object=path,
        sha256=sha256_hex(data),
        size=len(data),
        samples=len(samples),
        class_counts=dict(counts),
        made_by=made_by,
        seconds=seconds,
        committed_at=time.time(),
    )
    won = dataset.store.put_once(f"commits/{shard:06d}.json", to_json(asdict(record)))
    if not won:
        dataset.store.delete_tree(path)
    faults.maybe("shard.after_commit")
    return won
