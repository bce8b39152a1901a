"""Judge classifiers on real test images, and synthetic datasets against real ones."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from pyarrow import parquet
from torch import nn

from rayproj import classifiers
from rayproj.config import below
from rayproj.data.cells import cells_of, texts_of
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.accuracy import accuracy, confusion_matrix
from rayproj.evaluation.clip import ClipScore
from rayproj.evaluation.fairness import Judged, fairness
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.quality import by_cell, memorisation, quality
from rayproj.evaluation.skewsize import SkewSizeConfig, skewsize, variables
from rayproj.evaluation.watermark import MARKED, REAL, read_key, survivals
from rayproj.storage.store import Store

Name = TypeVar("Name")
MAIN = "test"  # the name of the first test set


@dataclass
class EvaluateConfig:
    """What to judge, on what."""

    test: str = ""  # real images with labels that no training has seen
    tests: dict[str, str] = field(
        default_factory=dict
    )  # further ones of the same classes, such as from elsewhere, by name
    reference: str = ""  # real images that synthetic ones are compared with; "": no measures of quality
    classifiers: dict[str, str] = field(default_factory=dict)  # name -> run dir
    synthetic: dict[str, str] = field(default_factory=dict)  # name -> dataset
    # name in `synthetic` -> the real images that its model learned from: how many of the set are near copies of them. Of
    # private images that is a private output, which no ε covers.
    learned_from: dict[str, str] = field(default_factory=dict)
    quality_by: list[str] = field(default_factory=list)  # fields, such as [label, tone]: quality within each cell too
    samples: int = 1000  # images of each set in the measures of quality, which depend on their number
    feature_size: int = 64  # side to which images are resized for the feature extractor
    batch: int = 128
    clip: str = ""  # folder of a CLIP model: how well images go with their texts, of every set that has `captions`
    captions: str = "prompt"  # the field with the texts
    # File with the secret of the synthetic images' watermark: what it survives, and how often real images seem to have it.
    watermark_key: str = ""
    # Attributes of the test images: SkewSize of each classifier, and measures by group, over each and over the
    # intersections of up to skewsize.together.
    groups: list[str] = field(default_factory=list)
    skewsize: SkewSizeConfig = field(default_factory=SkewSizeConfig)
    high_risk: list[str] = field(
        default_factory=list
    )  # classes that must not be missed: how often they are seen, by group
    group_examples: int = 30  # groups with fewer are left out of the measures by group
    bootstraps: int = 200  # for the intervals of gaps, some 15 s for each classifier, test set and variable; 0: none
    predictions: bool = False  # keep what is said of each test image, in predictions.parquet

    def problems(self) -> list[str]:
        unknown = sorted(set(self.learned_from) - set(self.synthetic))
        found = [f"evaluate.learned_from has '{name}', which evaluate.synthetic has not." for name in unknown]
        found += below(1, "evaluate", self, "samples", "feature_size", "batch")
        found += below(0, "evaluate", self, "group_examples", "bootstraps")
        if MAIN in self.tests:
            found.append(f"evaluate.tests: '{MAIN}' is the name of evaluate.test; give the set another.")
        if REAL in self.synthetic:
            found.append(f"evaluate.synthetic: '{REAL}' names the test images; give the set another name.")
        if not self.reference and (self.synthetic or self.clip or self.watermark_key):
            found.append(
                "evaluate.reference must name real images, with which those of evaluate.synthetic are compared."
            )
        return found


def evaluate(config: EvaluateConfig, world: World, link: Link, store: Store | None = None) -> dict[str, Any]:
    """Accuracy and confusion of each classifier on each test set, the measures of quality of each synthetic set; ranks share
    the images.

    The test images, as a set beside the reference, are given as "real": no generator can be expected to be nearer at this
    number of samples.

    Args:
        store: where predictions are kept.

    Raises:
        UserError: a run or dataset is not there, or too small.
    """
    tasks = len(config.classifiers) + (len(config.synthetic) + 3 if config.reference else 0)
    if world.rank == 0:
        link.report({"type": "total", "steps": tasks})
    progress = _Progress(world, link)
    classes = Dataset.open(config.test).header.classes
    judged, groups = _judged(config, world, progress)
    if config.predictions and store and world.rank == 0:
        store.write("predictions.parquet", _table(judged, groups, classes))
    of = {test: _measured(config, classes, found, groups[test], world) for test, found in judged.items()}
    if world.rank == 0 and config.classifiers:
        rows = [[test, name, *v.values()] for test, found in of.items() for name, v in found["accuracy"].items()]
        columns = ["test", "classifier", *next(iter(of[MAIN]["accuracy"].values()))]
        link.report({"type": "table", "name": "accuracy", "columns": columns, "rows": rows})
    measures, cells, marked, extractor = _quality(config, world, progress) if config.reference else ({}, {}, None, "")
    return {
        "classes": list(classes),
        **of.pop(MAIN),
        "tests": of,
        "quality": {
            "feature_extractor": extractor,
            "samples": config.samples,
            "frechet_distance": {name: found["frechet_distance"] for name, found in measures.items()},
            "measures": measures,
            "by_cell": cells,
        },
        "watermark": marked,
    }


Attributes = dict[str, np.ndarray]
"""Grouping variable -> text [n] of the test images, None where it is not known."""


def _judged(
    config: EvaluateConfig, world: World, progress: _Progress
) -> tuple[dict[str, dict[str, Judged]], dict[str, Attributes]]:
    """What each classifier says of each test set, by set and classifier, and the sets' grouping variables; on every rank."""
    sets = {name: Dataset.open(uri) for name, uri in {MAIN: config.test, **config.tests}.items()}
    classes = sets[MAIN].header.classes
    if unknown := sorted(set(config.high_risk) - set(classes)):
        raise UserError(f"evaluate.high_risk has '{unknown[0]}'; the classes are {', '.join(classes)}.")
    if other := [name for name, test in sets.items() if test.header.classes != classes]:
        raise UserError(
            f"The classes of evaluate.tests.{other[0]} are not those of evaluate.test: {', '.join(classes)}."
        )
    risky = tuple(map(classes.index, config.high_risk))
    found: dict[str, dict[str, Judged]] = {name: {} for name in sets}
    groups: dict[str, Attributes] = {name: {} for name in sets}
    for name, run in config.classifiers.items():
        model = classifiers.load(run, world.device)
        for place, test in sets.items():
            labels, probabilities, groups[place] = _predict(config, test, model, world)
            found[place][name] = Judged(labels, probabilities, risky)
        right = found[MAIN][name].predictions == found[MAIN][name].labels
        progress.add(**{f"accuracy/{name}": float(right.mean())})
    return found, groups


def _table(judged: dict[str, dict[str, Judged]], groups: dict[str, Attributes], classes: tuple[str, ...]) -> bytes:
    """A Parquet file with a row for each classifier and test image, in the order of the set."""
    tables, names = [], np.array(classes)
    for test, found in judged.items():
        for name, one in found.items():
            columns = {"test": [test] * len(one.labels), "classifier": [name] * len(one.labels)}
            columns |= {"label": names[one.labels]}
            said = {"prediction": names[one.predictions], "probabilities": list(one.probabilities.astype(np.float32))}
            by = {
                name: pa.array(values, pa.string()) for name, values in groups[test].items()
            }  # also where all are unknown
            tables.append(pa.table({**columns, **said, **by}))
    sink = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), sink)
    return sink.getvalue()


def _measured(
    config: EvaluateConfig, classes: tuple[str, ...], judged: dict[str, Judged], attributes: Attributes, world: World
) -> dict[str, Any]:
    """Of one test set, by classifier; each rank works out some of the measures by group."""
    confusion = {name: confusion_matrix(one.labels, one.predictions, len(classes)) for name, one in judged.items()}
    by = variables(attributes, config.skewsize.together)
    mine: dict[tuple[str, str], Any] = {}
    pairs = [(name, variable) for name in judged for variable in by]
    for name, variable in pairs[world.rank :: world.world_size]:
        one, values = judged[name], by[variable]
        told = config.skewsize
        skew = skewsize(
            one.labels, one.predictions, np.array(values, object), classes, not told.plain, told.min_examples,
            told.permutations, told.bootstraps,
        )  # fmt: skip
        mine[name, variable] = skew, fairness(one, values, config.group_examples, config.bootstraps)
    found = _from_all(mine, pairs, world)

    def named(k: int) -> dict[str, dict[str, Any]] | None:
        return {name: {v: found[name, v][k] for v in by} for name in judged} if config.groups else None

    return {
        "accuracy": {name: accuracy(matrix) for name, matrix in confusion.items()},
        "confusion": {name: matrix.tolist() for name, matrix in confusion.items()},
        "skewsize": named(0),
        "fairness": named(1),
    }


def _quality(
    config: EvaluateConfig, world: World, progress: _Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any] | None, str]:
    """The measures of each set of images, those within cells, what is left of the watermark, and the network whose features
    were compared."""
    extractor = EfficientNetLite0Features(config.feature_size, world.device)
    reference, real = (_features(config, uri, extractor, world) for uri in (config.reference, config.test))
    progress.add()
    sets, mine, parts = {REAL: config.test, **config.synthetic}, {}, dict[str, Any]()
    of_reference = _cells(config, config.reference)
    for number, (name, uri) in enumerate(sets.items()):
        features = real if name == REAL else _features(config, uri, extractor, world)
        learned = (
            _features(config, config.learned_from[name], extractor, world, 0) if name in config.learned_from else None
        )
        if number % world.world_size == world.rank:
            copied = {} if learned is None else memorisation(learned, real, features)
            mine[name] = quality(reference, features) | copied
            if config.quality_by:
                told = (of_reference, features, _cells(config, uri))
                parts[name] = by_cell(reference, *told, config.group_examples)
        progress.add()
    measures, cells = _from_all(mine, sets, world), _from_all(parts, sets if config.quality_by else {}, world)
    if config.clip:
        clip = ClipScore(config.clip, world.device)
        for name, uri in sets.items():
            measures[name] |= _clip_score(config, uri, clip, world)
    marked = None
    if config.watermark_key:
        secret, most = read_key(config.watermark_key), min(MARKED, config.samples)
        marked = survivals(config.synthetic, config.test, secret, most)
    shown = {f"{key}/{name}": v for name, found in measures.items() for key, v in found.items() if v is not None}
    progress.add(**shown)
    return measures, cells, marked, extractor.name


def _cells(config: EvaluateConfig, uri: str) -> list[str]:
    """The cell of each of the images whose features are looked at."""
    if not config.quality_by:
        return []
    cells = cells_of([Dataset.open(uri)], config.quality_by, config.samples)
    return [cells.names[number] for number in cells.numbers]


class _Progress:
    def __init__(self, world: World, link: Link) -> None:
        self.world, self.link, self.done = world, link, 0

    def add(self, **values: float) -> None:
        self.done += 1
        if self.world.rank == 0:
            self.link.report({"type": "metrics", "step": self.done, **values})


@torch.no_grad()
def _predict(
    config: EvaluateConfig, test: Dataset, model: nn.Module, world: World
) -> tuple[np.ndarray, np.ndarray, Attributes]:
    """Labels, probabilities [n, classes] and groups by variable of all test images, on every rank."""
    if missing := [name for name in config.groups if name not in test.header.fields]:
        raise UserError(f"{test.uri} has no attribute '{missing[0]}'; it has {', '.join(test.header.fields)}.")
    reader = Reader(test, fields=["image", "label", *config.groups])
    found = []
    for ids in _share(np.arange(test.header.num_samples), world, config.batch):
        batch = reader.gather(ids)
        predicted = model(torch.from_numpy(batch["image"]).to(world.device)).softmax(1).cpu().numpy()
        said = (texts_of(batch[name], test.header.values_of(name)) for name in config.groups)
        found.append((batch["label"], predicted, *(np.array([text or None for text in of], object) for of in said)))
    everything: list[Any] = [None] * world.world_size
    dist.all_gather_object(everything, found)
    columns = zip(*[part for parts in everything for part in parts], strict=True)
    labels, probabilities, *attributes = (np.concatenate(column) for column in columns)
    return labels, probabilities, dict(zip(config.groups, attributes, strict=True))


def _from_all(mine: dict[Name, Any], names: Iterable[Name], world: World) -> dict[Name, Any]:
    """What each rank has of the names, together and in their order, on every rank."""
    everything: list[Any] = [None] * world.world_size
    dist.all_gather_object(everything, mine)
    found = {name: value for part in everything for name, value in part.items()}
    return {name: found[name] for name in names}


def _features(
    config: EvaluateConfig, uri: str, extractor: EfficientNetLite0Features, world: World, samples: int | None = None
) -> np.ndarray:
    """Features [samples, d] of the first images of a dataset, `evaluate.samples` unless told, 0 for all; on every rank."""
    dataset = Dataset.open(uri)
    wanted = config.samples if samples is None else samples or dataset.header.num_samples
    if dataset.header.num_samples < wanted:
        raise UserError(
            f"{dataset.uri} has {dataset.header.num_samples} images, fewer than evaluate.samples={wanted}; "
            "the distances need equal numbers: lower evaluate.samples."
        )
    reader = Reader(dataset, fields=["image"])
    found = [np.zeros((0, extractor.dimensions), np.float32)]
    for ids in _share(np.arange(wanted), world, config.batch):
        found.append(extractor(torch.from_numpy(reader.gather(ids)["image"])).cpu().numpy())
    everything: list[Any] = [None] * world.world_size
    dist.all_gather_object(everything, np.concatenate(found))
    return np.concatenate(everything)


def _clip_score(config: EvaluateConfig, uri: str, clip: ClipScore, world: World) -> dict[str, float]:
    """The mean score of the images of a set that have a text, and its standard error; nothing for a set without."""
    dataset = Dataset.open(uri)
    if config.captions not in dataset.header.fields:
        return {}
    reader, found = Reader(dataset, fields=["image", config.captions]), [np.zeros(0)]
    for ids in _share(np.arange(min(config.samples, dataset.header.num_samples)), world, config.batch):
        batch = reader.gather(ids)
        there = np.array([bool(text) for text in batch[config.captions]], bool)
        if there.any():
            images, texts = torch.from_numpy(batch["image"][there]), list(batch[config.captions][there])
            found.append(clip(images, texts).double().cpu().numpy())
    everything: list[Any] = [None] * world.world_size
    dist.all_gather_object(everything, np.concatenate(found))
    scores = np.concatenate(everything)
    if not len(scores):
        return {}
    return {"clip_score": float(scores.mean()), "clip_score_error": float(scores.std() / np.sqrt(len(scores)))}


def _share(ids: np.ndarray, world: World, batch: int) -> list[np.ndarray]:
    mine = np.array_split(ids, world.world_size)[world.rank]
    return [mine[i : i + batch] for i in range(0, len(mine), batch)]
