"""Real images into datasets of committed shards, one dataset for each part of the split."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from glob import glob
from typing import Any

from rayproj.data.dataset import Dataset, Field, Header, Inputs
from rayproj.data.leaks import Leaks, fingerprints, groups, in_threads, take_out
from rayproj.data.parts import KeepConfig, hashed, keep, shuffle
from rayproj.data.sources import Source, SourceConfig, open_source, pixels
from rayproj.data.split import UNLABELLED, assign, by_label
from rayproj.data.writer import Sample, commit_shard
from rayproj.errors import UserError


@dataclass
class ImportConfig:
    """What to import, split how, where to."""

    source: SourceConfig = field(default_factory=SourceConfig)
    out: str = "???"  # a part goes to <out>/<part>
    fractions: dict[str, float] = field(default_factory=dict)  # of what the source calls "train"; {}: keep its splits
    # part -> the classes whose samples it keeps, the others being left out; {}: all. Labels mean the same in every part.
    classes: dict[str, list[str]] = field(default_factory=dict)
    no_label: list[str] = field(default_factory=list)  # classes of the source that mean that a sample has none
    leaks: Leaks = Leaks.refuse  # groups, and images that are the same pixel by pixel, in two parts of the split
    keep: list[KeepConfig] = field(default_factory=list)  # parts of chosen samples; []: as they were split
    shuffle: dict[str, list[str]] = field(default_factory=dict)  # part -> attributes dealt out anew, as a control
    shard_size: int = 256
    seed: int = 0

    def problems(self) -> list[str]:
        found = [] if self.shard_size > 0 else ["data.shard_size must be positive."]
        total = sum(self.fractions.values())
        if self.fractions and (abs(total - 1) > 1e-9 or min(self.fractions.values()) <= 0):
            found.append(f"data.fractions must be positive and sum to 1; they sum to {total:g}.")
        return found


def import_dataset(config: ImportConfig, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Write every part; shards that are committed already are left as they are.

    Within a part the samples stand in the order of a keyed hash, so that every shard is a mix of the classes.

    Returns:
        Samples, shards and class counts of each part.
    """
    source, parts, counts = _read(config, look=True)
    datasets = {part: Dataset.create(f"{config.out}/{part}", _header(source, part, samples, config))
                for part, samples in parts.items()}  # fmt: skip
    total = sum(dataset.header.num_shards for dataset in datasets.values())
    report({"type": "total", "steps": total})
    done, began, written = 0, time.time(), 0
    for part, dataset in datasets.items():
        ordered = sorted(parts[part], key=lambda sample: hashed("order", sample["key"], config.seed))
        for shard in range(dataset.header.num_shards):
            if dataset.record(shard) is None:
                start = time.time()
                span = dataset.header.shard_range(shard)
                samples = ordered[span.start : span.stop]
                images = in_threads(pixels, samples)
                samples = [{**sample, "image": image} for sample, image in zip(samples, images, strict=True)]
                commit_shard(dataset, shard, samples, "import", time.time() - start)
                written += len(span)
                report(
                    {"type": "span", "actor": "import", "what": f"{part} {shard}", "start": start, "end": time.time()}
                )
            done += 1
            speed = written / max(1e-9, time.time() - began)
            report({"type": "metrics", "step": done, "images_per_second": speed})
    return {
        "parts": {part: _summary(dataset) for part, dataset in datasets.items()},
        "samples": sum(dataset.header.num_samples for dataset in datasets.values()),
        "source": source.name,
        "left_out": counts,
        "classes": config.classes,
        "licence": source.licence,
        "attribution": source.attribution,
    }


def headers(config: ImportConfig, inputs: Inputs) -> dict[str, Header]:
    """What an import would write, by URI; of a source that is not there, as many training samples as are assumed."""
    path = config.source.path
    if path and "://" not in path and not glob(path):
        whole = replace(inputs.absent(path).only("image", "label"), shard_size=config.shard_size)
        fractions = config.fractions or {"train": 1.0}
        sizes = {part: round(fraction * whole.num_samples) for part, fraction in fractions.items()}
        return {f"{config.out}/{part}": replace(whole, num_samples=size) for part, size in sizes.items()}
    source, parts, _ = _read(config)
    return {f"{config.out}/{part}": _header(source, part, samples, config) for part, samples in parts.items()}


def _read(
    config: ImportConfig, look: bool = False
) -> tuple[Source, dict[str, list[Sample]], dict[str, dict[str, int]]]:
    """The samples of each part, as `Source.rows` has them; and why how many were left out of which.

    Args:
        look: for equal images in two parts too, for which all are read.
    """
    source = _without_label(open_source(config.source), config.no_label)
    kept = {part: _labels(source.classes, names) for part, names in config.classes.items()}
    parts: dict[str, list[Sample]] = {part: [] for part in config.fractions}
    without_label: Counter[str] = Counter()
    for sample in source.rows():
        split, group = sample.pop("split"), sample["group"]
        assigned = assign(group, config.fractions, config.seed) if config.fractions and split == "train" else split
        part = by_label(assigned, sample["label"])
        if part is None:
            without_label[assigned] += 1
        elif part not in kept or sample["label"] in kept[part]:
            label = -1 if part == UNLABELLED else sample["label"]
            parts.setdefault(part, []).append(sample | {"label": label})
    parts = {part: samples for part, samples in parts.items() if samples}
    missing = sorted({*config.fractions, *kept} - parts.keys())
    if missing:
        raise UserError(
            f"The part '{missing[0]}' got no sample; the source is too small for data.fractions and data.classes, or has "
            f"no such part: there are {', '.join(sorted(parts))}."
        )
    counts = {"without a label": dict(without_label)}
    counts["groups in two parts"] = take_out(parts, "group", groups, config.leaks)
    if look:
        counts["images in two parts"] = take_out(parts, "image", fingerprints, config.leaks)
    parts = keep(parts, config.keep, source.classes, config.seed)
    for part, attributes in config.shuffle.items():
        if part not in parts:
            raise UserError(f"data.shuffle has the part '{part}'; there are {', '.join(sorted(parts))}.")
        parts[part] = shuffle(parts[part], attributes, config.seed)
    return source, _by_shape(parts) if config.source.buckets else parts, counts


def _by_shape(parts: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """<part>/<height>x<width> -> its samples."""
    found: dict[str, list[Sample]] = {}
    for part, samples in parts.items():
        for sample in samples:
            found.setdefault("{0}/{2}x{3}".format(part, *pixels(sample).shape), []).append(sample)
    return found


def _without_label(source: Source, names: list[str]) -> Source:
    """The source with samples of these classes as ones that have no label."""
    gone, classes = _labels(source.classes, names, "data.no_label"), [c for c in source.classes if c not in names]
    number = [-1 if k in gone else classes.index(name) for k, name in enumerate(source.classes)]

    def rows() -> Iterator[Sample]:
        for sample in source.rows():
            yield {**sample, "label": number[sample["label"]] if sample["label"] >= 0 else -1}

    return replace(source, classes=tuple(classes), rows=rows) if names else source


def _labels(known: tuple[str, ...], names: list[str], given: str = "data.classes") -> set[int]:
    wrong = sorted(set(names) - set(known))
    if wrong:
        raise UserError(f"{given} has '{wrong[0]}', and the source has {', '.join(known)}.")
    return {known.index(name) for name in names}


def _header(source: Source, part: str, samples: list[Sample], config: ImportConfig) -> Header:
    base = part.partition("/")[0]  # without its bucket
    rules = [rule for rule in config.keep if rule.part == base]
    scalars = {"label": Field("int"), **{name: Field("str") for name in source.attributes}}
    return Header(
        name=f"{source.name} ({part})",
        fields={"image": Field("png", pixels(samples[0]).shape), **scalars},
        num_samples=len(samples),
        shard_size=config.shard_size,
        classes=source.classes,
        licence=source.licence,
        attribution=source.attribution,
        provenance={
            "source": source.name,
            "part": part,
            "fractions": config.fractions,
            "seed": config.seed,
            **({"classes": config.classes[base]} if base in config.classes else {}),
            **({"keep": [_said(rule) for rule in rules]} if rules else {}),
            **({"shuffle": config.shuffle[base]} if base in config.shuffle else {}),
        },
    )


def _said(rule: KeepConfig) -> dict[str, Any]:
    """As a header has it, the same as before there was `after`."""
    return {name: value for name, value in asdict(rule).items() if name != "after" or value}


def _summary(dataset: Dataset) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for record in dataset.records().values():
        for name, count in record.class_counts.items():
            counts[name] = counts.get(name, 0) + count
    return {"samples": dataset.header.num_samples, "shards": dataset.header.num_shards, "class_counts": counts}
