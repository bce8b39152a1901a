"""The slices that were found, scaled up to a dataset of failures, within quotas, and its transfer to other classifiers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.discovery.examine import FEATURE, OWN, Results, ids_of
from rayproj.discovery.generators import in_turn
from rayproj.discovery.search import Per, Search, joined, shared
from rayproj.discovery.slices import Slice
from rayproj.evaluation.proportions import Rate


def scaled_up(search: Search, slices: list[Slice]) -> dict[str, Any]:
    """Further images of the slices, their failures as a dataset, and how many of them other classifiers fail on too; with a
    quota also of each finding or label how many failures there are for it, and of how many images."""
    config, per = search.config, dict[str, list[Slice]]()
    for of in slices:
        per.setdefault(of.label if config.quota_per is Per.label else of.name, []).append(of)
    if config.quota:
        drawn = until_full(search, per)
    else:
        drawn = [search.run("scale", shared(slices, config.scale_up), confirming=True, once=True)]
    stage = joined(drawn)
    failures = np.flatnonzero(stage.failed[OWN])
    found: dict[str, Any] = {"images": len(stage.slices), "failed": len(failures)}
    if config.quota:
        taken = {name: _within(config.quota, own, stage) for name, own in per.items()}
        failures = np.sort(np.concatenate(list(taken.values())))
        found |= {"quota": config.quota, "quotas": {
            name: {"failures": len(of), "images": seen(drawn, per[name]).images, "full": len(of) == config.quota}
            for name, of in taken.items()
        }}  # fmt: skip
    found["failures"] = len(failures)
    if not len(failures):
        return found
    found["dataset"] = _adversarial(search, drawn, failures, slices)
    found["transfer"] = {
        name: {
            "drawn": Rate(int(failed.sum()), len(failed)).described(),
            "adversarial": Rate(int(failed[failures].sum()), len(failures)).described(),
        }
        for name, failed in stage.failed.items()
    }
    found["slices"] = {
        of.name: Rate(int(stage.failed[OWN][at].sum()), len(at)).described()
        for of in slices
        if len(at := np.flatnonzero([s == of for s in stage.slices]))
    }
    return found


def until_full(search: Search, per: dict[str, list[Slice]]) -> list[Results]:
    """Images of the slices of each quota, in stages, until it is full, none is left to draw, or `scale_up` is spent.

    A stage draws for each as many as are likely to do by the failures seen so far, and no more than its even share of what
    is left: one that can hardly be filled takes nothing from the others. The slices of a label get as many images each.

    Args:
        per: by what has a quota, its slices.
    """
    config, drawn, left, more = search.config, list[Results](), search.config.scale_up, dict(per)
    while more and left:
        wanted, asked = list[tuple[Slice, int]](), list(more)[:left]
        for name in asked:
            need, known = config.quota - seen(drawn, per[name]).failures, seen(search.done, per[name])
            # The rate by Laplace's rule of succession; a deviation of Poisson's law more than the mean will mostly do.
            likely = math.ceil((need + math.sqrt(need)) * (known.images + 2) / (known.failures + 1))
            wanted += shared(more[name], min(likely, left // len(asked)))
        drawn.append(search.run(f"scale-{len(drawn) + 1}", wanted, confirming=True, once=True))
        left -= len(drawn[-1].slices)
        none = {of for of, _ in wanted} - set(drawn[-1].slices)
        more = {
            name: rest
            for name, own in more.items()
            if seen(drawn, per[name]).failures < config.quota and (rest := [of for of in own if of not in none])
        }
    return drawn


def _within(quota: int, slices: Sequence[Slice], stage: Results) -> np.ndarray:
    """The first failures of these slices, int64, no more than the quota; the slices take turns, so that what is too much is
    not of the last of them."""
    at = [i for i in np.flatnonzero(stage.failed[OWN]).tolist() if stage.slices[i] in slices]
    return np.array(in_turn([stage.slices[i].name for i in at], at)[:quota], np.int64)


def seen(stages: Sequence[Results], slices: Sequence[Slice]) -> Rate:
    """How many images of these slices there are in some stages, and how many the classifier fails on."""
    at = [failed for on in stages for of, failed in zip(on.slices, on.failed[OWN], strict=True) if of in slices]
    return Rate(int(sum(at)), len(at))


def _adversarial(search: Search, drawn: list[Results], failures: np.ndarray, slices: list[Slice]) -> str:
    """Write the failures among the images of some stages; returns the dataset's place. Each has the number and the seed that
    key its randomness, the hash of what drew it ("drawn_by": a model's commit, a pipeline's digest or a dataset's manifest)
    and those of the classifiers. Labels are numbered as the classifier's classes, if all of them are such, so that they can
    be mixed with what it has learned from.

    Args:
        failures: sorted numbers among the images of all the stages together.
    """
    config, own, header = search.config, search.bench.classifiers[OWN], drawn[0].dataset.header
    classes = own.classes if set(header.classes) <= set(own.classes) else header.classes
    kept = {name: f for name, f in header.fields.items() if name != FEATURE}
    said = {n: v for n, v in header.provenance.items() if n not in ("stage", "slices", "rows", "first")}
    digests = {f"digest_{name}": one.digest for name, one in search.bench.classifiers.items()}
    digests["drawn_by"] = next(said[name] for name in ("model_commit", "pipeline_digest", "manifest") if name in said)
    planned = Header(
        name=f"failures of {config.classifier.model}",
        fields={**kept, "number": Field("int"), "seed": Field("int"), **dict.fromkeys(digests, Field("str"))},
        num_samples=len(failures),
        shard_size=config.shard_size,
        classes=tuple(classes),
        provenance={**said, "slices": [of.to_json() for of in slices],
                    "scaled_from": {stage.dataset.uri: stage.dataset.manifest_hash() for stage in drawn}},
    )  # fmt: skip
    dataset = Dataset.create(f"{config.out}/adversarial", planned)
    readers = [Reader(stage.dataset, list(kept)) for stage in drawn]
    begins = np.cumsum([0, *(len(stage.slices) for stage in drawn)])
    numbers, stage = np.concatenate([ids_of(of.dataset.header) for of in drawn]), joined(drawn)
    for shard in range(planned.num_shards):
        if dataset.record(shard) is not None:
            continue
        began, span = time.time(), planned.shard_range(shard)
        chosen = failures[span.start : span.stop]
        parts = []
        for reader, start, end in zip(readers, begins, begins[1:], strict=False):
            if len(here := chosen[(start <= chosen) & (chosen < end)] - start):
                parts.append(reader.gather(here))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in kept}
        columns["label"] = np.array([classes.index(header.classes[i]) for i in columns["label"]])
        columns["slice"] = np.array([slices.index(stage.slices[i]) for i in chosen])
        columns["number"] = numbers[chosen]
        values = {n: columns[n] if kept.get(n, Field("int")).array else columns[n].tolist() for n in columns}
        alike = {"seed": search.bench.seed, **digests}
        samples = [
            {"key": f"{i:08d}", **{n: v[k] for n, v in values.items()}, **alike}
            for k, i in enumerate(columns["number"])
        ]
        commit_shard(dataset, shard, samples, "discovery", time.time() - began)
    return dataset.uri
