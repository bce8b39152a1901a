"""A dataset in words and as a contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.report import figures
from rayproj.synthesis.plan import stated

LOOKED_AT = 4096  # samples whose attributes are counted
VALUES = 12  # of an attribute that are named


def describe(uri: str) -> str:
    """Lines on what a dataset holds, where it comes from and what it guarantees.

    Raises:
        UserError: there is none.
    """
    dataset = Dataset.open(uri)
    header, records = dataset.header, dataset.records()
    size = sum(record.size for record in records.values())
    samples = sum(record.samples for record in records.values())
    whole = "" if dataset.complete else f" ({samples:,} of them in {len(records):,} shards so far)"
    forms = {name: f"{f.encoding} {'x'.join(map(str, f.shape))}".strip() for name, f in header.fields.items()}
    lines = [
        f"{header.name}: {header.num_samples:,} samples in {header.num_shards:,} shards{whole}, {size / 1e6:,.1f} MB",
        "fields: " + ", ".join(f"{name} ({form})" for name, form in forms.items()),
    ]
    counts = Counter[str]()
    for record in records.values():
        counts.update(record.class_counts)
    if header.classes:
        lines.append(f"classes: {_listed({name: counts[name] for name in header.classes})}")
    lines += _attributes(dataset)
    weights = dataset.weights()
    if weights is not None:
        lines.append(f"weights: {weights.min():.3g} to {weights.max():.3g}, together {weights.sum():,.1f} samples")
    said = header.provenance
    for name in ("source", "model", "weak", "images", "curated_from", "upscaled_from", "indexed"):
        if said.get(name):
            lines.append(f"{name.replace('_', ' ')}: {said[name]}")
    left_out = sum(map(len, [*said.get("skipped", {}).values(), *said.get("left_out", {}).values()]))
    if left_out:
        lines.append(f"left out as broken: {left_out:,}")
    if header.licence or header.attribution:
        lines.append(f"licence: {header.licence or 'not stated'}; {header.attribution or 'no attribution'}")
    if "private" in said:
        lines.append(
            f"privacy: {stated(said['private']) or 'no guarantee: its model saw no private data by its config'}"
        )
    if dataset.complete:
        lines.append(f"manifest: {dataset.manifest_hash()}")
    return "\n".join(lines)


def _attributes(dataset: Dataset) -> list[str]:
    """Counts of what has few values; of the first samples that are there."""
    header = dataset.header
    names = [n for n, f in header.fields.items() if n != "label" and (f.values or f.encoding == "str")]
    there = [i for shard in dataset.records() for i in header.shard_range(shard)][:LOOKED_AT]
    if not names or not there:
        return []
    columns, lines = Reader(dataset, names).gather(np.array(there)), []
    for name in names:
        values = header.fields[name].values
        found = Counter((values[v] if v >= 0 else "none") if values else str(v) for v in columns[name])
        if len(found) <= max(VALUES, len(values)):
            of = "" if len(there) == header.num_samples else f", of {len(there):,}"
            lines.append(f"{name}{of}: {_listed(dict(found.most_common()))}")
        else:
            lines.append(f"{name}: {len(found):,} different texts, such as '{next(iter(found))[:60]}'")
    return lines


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{name or 'none'} {count:,}" for name, count in list(counts.items())[:VALUES]]
    return ", ".join(shown) + (f", and {len(counts) - VALUES} more" if len(counts) > VALUES else "")


def write_beside(uris: Sequence[str], file: str, count: int = 16) -> str:
    """Write a PNG with the same samples of several datasets, a row for each dataset; smaller images are drawn larger.

    Raises:
        UserError: a dataset has no images yet, or they are not of the same channels and of sides that go into the largest.
    """
    datasets = [Dataset.open(uri) for uri in uris]
    shapes = [dataset.header.fields["image"].shape if "image" in dataset.header.fields else () for dataset in datasets]
    side = max((shape[-1] for shape in shapes if shape), default=0)
    if any(not s or s[0] != shapes[0][0] or s[1] != s[2] or side % s[-1] for s in shapes):
        told = ", ".join("x".join(map(str, shape)) or "none" for shape in shapes)
        raise UserError(
            f"Images of {told} cannot be shown beside each other; they are to be squares of sides that divide."
        )
    count = min(count, *(dataset.header.num_samples for dataset in datasets))
    rows = []
    for dataset, shape in zip(datasets, shapes, strict=True):
        images = Reader(dataset, ["image"]).gather(np.arange(count))["image"]
        rows.append(images.repeat(side // shape[-1], axis=2).repeat(side // shape[-1], axis=3))
    names = [f"{shape[1]}x{shape[2]}" for shape in shapes]
    Path(file).write_bytes(figures.png(figures.samples({"": np.stack(rows)}, names)))
    return file


def write_sheet(uri: str, file: str, per_class: int = 8) -> str:
    """Write a PNG with some images of each class, or of all where there is none.

    Raises:
        UserError: the dataset has no images yet.
    """
    dataset = Dataset.open(uri)
    header = dataset.header
    there = np.array([i for shard in dataset.records() for i in header.shard_range(shard)][:LOOKED_AT], np.int64)
    image = header.fields.get("image")
    if image is None or not image.array or not image.array.image or not len(there):
        raise UserError(f"'{uri}' has no images to be shown; its fields are {', '.join(header.fields)}.")
    labelled = "label" in header.fields and bool(header.classes)
    labels = Reader(dataset, ["label"]).gather(there)["label"] if labelled else np.zeros(len(there), np.int64)
    names = {**dict(enumerate(header.classes)), -1: "no label"} if labelled else {0: "images"}
    rows = {n: there[labels == k][:per_class] for k, n in names.items() if (labels == k).any()}
    reader, blank = Reader(dataset, ["image"]), np.full((per_class, *image.shape), 255, np.uint8)
    sheet = []
    for ids in rows.values():
        row = blank.copy()
        row[: len(ids)] = reader.gather(ids)["image"]
        sheet.append(row)
    picture = figures.samples({header.name: np.stack(sheet)}, list(rows))
    Path(file).write_bytes(figures.png(picture))
    return file
