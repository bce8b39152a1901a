"""A dataset of chosen, weighted and captioned images, from one of all.

Every sample that is left out is in the list of reasons, `rejected.jsonl`, with all the rules that it broke; of those that
stay, `weights.npy` says how often each is to be drawn.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from string import Formatter
from typing import Any

import numpy as np
import torch

from rayproj.config import below
from rayproj.curation.duplicates import clusters, difference_hash, weights
from rayproj.curation.scorers import Columns, Nearest, RuleConfig, Score, Scorer, scorer
from rayproj.data.cells import cells_of
from rayproj.data.dataset import WEIGHTS, Dataset, Field, Header
from rayproj.data.encodings import ENCODINGS
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features

REJECTED = "rejected.jsonl"
DUPLICATE = "duplicate"  # the reason of those that duplicates.remove leaves out
PAIRS = 12  # that are shown


@dataclass
class DuplicatesConfig:
    """Images that are alike."""

    similarity: float = 0.0  # cosine of a network's features from which two are near duplicates, such as 0.9; 0: none
    hash_bits: int = -1  # of the 64 of a perceptual hash, in as many of which near duplicates may differ; -1: none
    remove: bool = False  # all but the first of a cluster; else they are weighted
    power: float = 0.0  # a cluster of k images is drawn as often as k^power others: 0 as one image, 1 as k
    feature_size: int = 64  # side to which images are resized for the network

    def problems(self) -> list[str]:
        found = below(1, "duplicates", self, "feature_size")
        if not 0 <= self.similarity <= 1:
            found.append("duplicates.similarity must lie in [0, 1].")
        if not -1 <= self.hash_bits < 32:
            found.append("duplicates.hash_bits must lie in [0, 31], or be -1.")
        return found if 0 <= self.power <= 1 else [*found, "duplicates.power must lie in [0, 1]."]


@dataclass
class CurateConfig:
    """From which images, to where, by which rules."""

    images: str = "???"
    out: str = "???"
    rules: dict[str, RuleConfig] = field(default_factory=dict)  # the reason -> the rule
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    # Further captions: name of the field -> a text with the sample's fields in braces, such as "a {style} of {caption}".
    captions: dict[str, str] = field(default_factory=dict)
    shard_size: int = 0  # 0: as of the images
    cells: list[str] = field(default_factory=list)  # fields, such as label and tone, by which what stays is counted
    batch: int = 256

    def problems(self) -> list[str]:
        wrong = [name for name in self.captions if not re.fullmatch(r"caption_\w+", name)]
        found = [f"captions.{name}: give it a name like caption_{name}." for name in wrong]
        return found + below(0, "curate", self, "shard_size") + below(1, "curate", self, "batch")


def curate(config: CurateConfig, report: Callable[[dict[str, Any]], None], device: str = "cpu") -> dict[str, Any]:
    """Write the dataset; shards that are committed already are left as they are.

    Returns:
        How many samples came and stayed, how many each rule left out, the clusters of near duplicates.

    Raises:
        UserError: a rule or template asks for what the images have not, or nothing stays.
    """
    source = Dataset.open(config.images)
    _check(config, source.header)
    reader = Reader(source)
    total = source.header.num_samples
    report({"type": "total", "steps": 2 * total})
    scores, judges, features = _judge(config, reader, total, report, device)
    broken = {name: rule.outside(scores[name]) for name, rule in config.rules.items()}
    rejected = np.zeros(total, bool)
    for outside in broken.values():
        rejected |= outside
    kept = np.flatnonzero(~rejected)
    if not len(kept):
        raise UserError(f"No image of {source.uri} passes all rules ({_counts(broken)}); loosen one.")
    weight, groups = np.ones(len(kept)), np.zeros(0, int)
    if features:
        groups = clusters(*((found[kept], similarity) for found, similarity in features))
        weight = weights(groups, config.duplicates.power)
        if config.duplicates.remove:
            first = np.unique(groups, return_index=True)[1]
            again = np.setdiff1d(np.arange(len(kept)), first)
            scores[DUPLICATE], broken[DUPLICATE] = np.zeros(total), np.zeros(total, bool)
            broken[DUPLICATE][kept[again]] = True
            scores[DUPLICATE][kept[again]] = kept[first[groups[again]]]  # of which it is one
            rejected |= broken[DUPLICATE]
            kept, weight = kept[np.sort(first)], np.ones(len(first))
    dataset = Dataset.create(config.out, _header(config, source, len(kept)))
    lines = [
        json.dumps({"index": int(i), "reasons": {n: float(scores[n][i]) for n in broken if broken[n][i]}})
        for i in np.flatnonzero(rejected)
    ]
    dataset.store.write(REJECTED, "".join(line + "\n" for line in lines).encode())
    buffer = io.BytesIO()
    np.save(buffer, weight.astype(np.float32))
    dataset.store.write(WEIGHTS, buffer.getvalue())
    pairs = {name: _show_pairs(name, scores[name], judge, reader, dataset) for name, judge in judges.items()
             if isinstance(judge, Nearest)}  # fmt: skip
    _write(config, reader, dataset, kept, lambda done: report({"type": "metrics", "step": total + done}))
    sizes = Counter(np.bincount(groups).tolist()) if len(groups) else Counter[int]()
    cells = cells_of([source], config.cells) if config.cells else None
    return {
        "samples": total,
        "kept": len(kept),
        "cells": cells
        and {
            name: {"samples": int(count), "kept": int((cells.numbers[kept] == number).sum())}
            for number, (name, count) in enumerate(zip(cells.names, cells.counts, strict=True))
        },
        "rejected": int(rejected.sum()),
        "reasons": {name: int(outside.sum()) for name, outside in broken.items()},
        "clusters": {str(size): count for size, count in sorted(sizes.items())},
        "effective": float(weight.sum()),
        "pairs": pairs,
    }


def _check(config: CurateConfig, header: Header) -> None:
    wanted = {rule.text for rule in config.rules.values() if rule.scorer.value in ("words", "pii", "blocked")}
    wanted |= {"label" for rule in config.rules.values() if rule.scorer is Scorer.confidence}
    for template in config.captions.values():
        try:
            wanted |= {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise UserError(f"The caption '{template}' cannot be read: {error}.") from error
    missing = sorted(wanted - set(header.fields))
    if missing:
        raise UserError(f"The images have no field '{missing[0]}'; they have {', '.join(sorted(header.fields))}.")


def _judge(
    config: CurateConfig, reader: Reader, total: int, report: Callable[[dict[str, Any]], None], device: str
) -> tuple[dict[str, np.ndarray], dict[str, Score], list[tuple[np.ndarray, float]]]:
    """The scores of all samples by rule, the rules' scorers, and by what duplicates are to be known."""
    judges: dict[str, Score] = {name: scorer(rule, device) for name, rule in config.rules.items()}
    looked = config.duplicates
    ways: list[tuple[Callable[[np.ndarray], np.ndarray], float]] = []
    if looked.similarity > 0:
        extractor = EfficientNetLite0Features(looked.feature_size, device)
        ways.append((lambda images: extractor(torch.from_numpy(images)).cpu().numpy(), looked.similarity))
    if looked.hash_bits >= 0:
        ways.append((difference_hash, 1 - looked.hash_bits / 32 - 1e-6))
    scores: dict[str, list[np.ndarray]] = {name: [] for name in judges}
    features: list[list[np.ndarray]] = [[] for _ in ways]
    for start in range(0, total, config.batch):
        columns = reader.gather(np.arange(start, min(start + config.batch, total)))
        for name, judge in judges.items():
            scores[name].append(judge(columns))
        for found, (way, _) in zip(features, ways, strict=True):
            found.append(way(columns["image"]))
        report({"type": "metrics", "step": min(start + config.batch, total)})
    joined = {name: np.concatenate(found) for name, found in scores.items()}
    return joined, judges, [(np.concatenate(f), s) for f, (_, s) in zip(features, ways, strict=True)]


def _show_pairs(name: str, score: np.ndarray, judge: Nearest, reader: Reader, dataset: Dataset) -> list[dict[str, Any]]:
    """Write a picture of the nearest pairs, the dataset's own images above; returns their indices and how near they are."""
    place = np.concatenate(judge.places)
    order = np.argsort(score if judge.rule.scorer is Scorer.pixels else -score, kind="stable")[:PAIRS]
    own, theirs = reader.gather(order)["image"], judge.reader.gather(place[order])["image"]
    if own.shape == theirs.shape:
        picture = np.concatenate([np.concatenate(list(row), axis=2) for row in (own, theirs)], axis=1)
        dataset.store.write(f"pairs-{name}.png", ENCODINGS["png"].encode(picture))
    return [{"index": int(i), "nearest": int(place[i]), judge.rule.scorer.value: float(score[i])} for i in order]


def _counts(broken: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name}: {int(outside.sum()):,}" for name, outside in broken.items())


def _header(config: CurateConfig, source: Dataset, size: int) -> Header:
    header = source.header
    return replace(
        header,
        name=f"{header.name}, curated",
        fields={**header.fields, **dict.fromkeys(config.captions, Field("str"))},
        num_samples=size,
        shard_size=config.shard_size or header.shard_size,
        provenance={
            **header.provenance,
            "curated_from": source.uri,
            "manifest": source.manifest_hash(),
            "rules": {name: {**asdict(rule), "scorer": rule.scorer.value} for name, rule in config.rules.items()},
            "duplicates": asdict(config.duplicates),
            "captions": config.captions,
        },
    )


def _write(
    config: CurateConfig,
    reader: Reader,
    dataset: Dataset,
    kept: np.ndarray,
    told: Callable[[int], None],
) -> None:
    for shard in range(dataset.header.num_shards):
        if dataset.record(shard) is not None:
            continue
        start, span = time.time(), dataset.header.shard_range(shard)
        columns = reader.gather(kept[span.start : span.stop])
        samples = [_sample(config, reader.dataset.header, columns, k, int(i)) for k, i in enumerate(columns["index"])]
        commit_shard(dataset, shard, samples, "curate", time.time() - start)
        told(span.stop)


def _sample(config: CurateConfig, header: Header, columns: Columns, k: int, index: int) -> dict[str, Any]:
    values = {name: columns[name][k] for name in header.fields}
    values = {n: v.item() if isinstance(v, np.generic) else v for n, v in values.items()}
    captions = {name: " ".join(template.format(**values).split()) for name, template in config.captions.items()}
    return {"key": f"{index:08d}", **values, **captions}
