"""Judge classifiers on real test images, and synthetic datasets against real ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayproj import classifiers
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.accuracy import accuracy, confusion_matrix
from rayproj.evaluation.clip import ClipScore
from rayproj.evaluation.fairness import Judged, fairness
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.quality import memorisation, quality
from rayproj.evaluation.skewsize import skewsize, variables
from rayproj.evaluation.watermark import key_name, read_key, survival

MARKED = 200  # images in which the watermark is looked for
CHANCE = 1e-3  # bound on an image without one that seems to have it


@dataclass
class EvaluateConfig:
    """What to judge, on what."""

    test: str = "???"  # real images with labels that no training has seen
    reference: str = "???"  # real images that synthetic ones are compared with
    classifiers: dict[str, str] = field(default_factory=dict)  # name -> run dir
    synthetic: dict[str, str] = field(default_factory=dict)  # name -> dataset
    # name in `synthetic` -> the real images that its model learned from: how many of the set are near copies of them. Of
    # private images that is a private output, which no ε covers.
    learned_from: dict[str, str] = field(default_factory=dict)
    samples: int = 1000  # images of each set in the measures of quality, which depend on their number
    feature_size: int = 64  # side to which images are resized for the feature extractor
    batch: int = 128
    clip: str = ""  # folder of a CLIP model: how well images go with their texts, of every set that has `captions`
    captions: str = "prompt"  # the field with the texts
    # File with the secret of the synthetic images' watermark: what it survives, and how often real images seem to have it.
    watermark_key: str = ""
    # Attributes of the test images: SkewSize of each classifier, and measures by group, over each and over pairs.
    groups: list[str] = field(default_factory=list)
    high_risk: list[str] = field(
        default_factory=list
    )  # classes that must not be missed: how often they are seen, by group
    group_examples: int = 30  # groups with fewer are left out of the measures by group

    def problems(self) -> list[str]:
        unknown = sorted(set(self.learned_from) - set(self.synthetic))
        return [f"evaluate.learned_from has '{name}', which evaluate.synthetic has not." for name in unknown]


def evaluate(config: EvaluateConfig, world: World, link: Link) -> dict[str, Any]:
    """Accuracy and confusion of each classifier, the measures of quality of each synthetic set; ranks share the images.

    The test images, as a set beside the reference, are given as "real": no generator can be expected to be nearer at this
    number of samples.

    Raises:
        UserError: a run or dataset is not there, or too small.
    """
    tasks = len(config.classifiers) + len(config.synthetic) + 3
    if world.rank == 0:
        link.report({"type": "total", "steps": tasks})
    progress = _Progress(world, link)
    test = Dataset.open(config.test)
    if unknown := sorted(set(config.high_risk) - set(test.header.classes)):
        raise UserError(f"evaluate.high_risk has '{unknown[0]}'; the classes are {', '.join(test.header.classes)}.")
    risky = tuple(map(test.header.classes.index, config.high_risk))
    confusion, groups, fair = {}, {}, {}
    for name, run in config.classifiers.items():
        labels, probabilities, attributes = _predict(config, test, run, world)
        judged = Judged(labels, probabilities, risky)
        confusion[name] = confusion_matrix(labels, judged.predictions, len(test.header.classes))
        by = variables(attributes)
        groups[name] = {
            variable: skewsize(labels, judged.predictions, np.array(values, object), test.header.classes)
            for variable, values in by.items()
        }
        fair[name] = {variable: fairness(judged, values, config.group_examples) for variable, values in by.items()}
        progress.add(**{f"accuracy/{name}": accuracy(confusion[name])["value"]})
    extractor = EfficientNetLite0Features(config.feature_size, world.device)
    reference, real = (_features(config, uri, extractor, world) for uri in (config.reference, config.test))
    progress.add()
    sets, mine = {"real": config.test, **config.synthetic}, {}
    for number, (name, uri) in enumerate(sets.items()):
        features = real if name == "real" else _features(config, uri, extractor, world)
        learned = (
            _features(config, config.learned_from[name], extractor, world, 0) if name in config.learned_from else None
        )
        if number % world.world_size == world.rank:
            copied = {} if learned is None else memorisation(learned, real, features)
            mine[name] = quality(reference, features) | copied
        progress.add()
    measures = _from_all(mine, sets, world)
    if config.clip:
        clip = ClipScore(config.clip, world.device)
        for name, uri in sets.items():
            measures[name] |= _clip_score(config, uri, clip, world)
    marked = _marks(config, sets) if config.watermark_key else None
    shown = {f"{key}/{name}": v for name, found in measures.items() for key, v in found.items() if v is not None}
    progress.add(**shown)
    found = {name: accuracy(matrix) for name, matrix in confusion.items()}
    if world.rank == 0:
        rows = [[name, *values.values()] for name, values in found.items()]
        columns = ["classifier", *next(iter(found.values()), {})]
        link.report({"type": "table", "name": "accuracy", "columns": columns, "rows": rows})
    return {
        "classes": list(test.header.classes),
        "accuracy": found,
        "confusion": {name: matrix.tolist() for name, matrix in confusion.items()},
        "quality": {
            "feature_extractor": extractor.name,
            "samples": config.samples,
            "frechet_distance": {name: found["frechet_distance"] for name, found in measures.items()},
            "measures": measures,
        },
        "skewsize": groups if config.groups else None,
        "fairness": fair if config.groups else None,
        "watermark": marked,
    }


class _Progress:
    def __init__(self, world: World, link: Link) -> None:
        self.world, self.link, self.done = world, link, 0

    def add(self, **values: float) -> None:
        self.done += 1
        if self.world.rank == 0:
            self.link.report({"type": "metrics", "step": self.done, **values})


@torch.no_grad()
def _predict(
    config: EvaluateConfig, test: Dataset, run: str, world: World
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Labels, probabilities [n, classes] and groups by variable of all test images, on every rank."""
    model = classifiers.load(run, world.device)
    if missing := [name for name in config.groups if name not in test.header.fields]:
        raise UserError(f"{test.uri} has no attribute '{missing[0]}'; it has {', '.join(test.header.fields)}.")
    reader = Reader(test, fields=["image", "label", *config.groups])
    found = []
    for ids in _share(np.arange(test.header.num_samples), world, config.batch):
        batch = reader.gather(ids)
        predicted = model(torch.from_numpy(batch["image"]).to(world.device)).softmax(1).cpu().numpy()
        found.append((batch["label"], predicted, *(batch[name].astype(str) for name in config.groups)))
    everything: list[Any] = [None] * world.world_size
    dist.all_gather_object(everything, found)
    columns = zip(*[part for parts in everything for part in parts], strict=True)
    labels, probabilities, *attributes = (np.concatenate(column) for column in columns)
    return labels, probabilities, dict(zip(config.groups, attributes, strict=True))


def _from_all(mine: dict[str, Any], names: Iterable[str], world: World) -> dict[str, Any]:
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


def _marks(config: EvaluateConfig, sets: dict[str, str]) -> dict[str, Any]:
    """What is left of the watermark of each set after each attack, and the share of real images that seem to have it."""
    secret, found = read_key(config.watermark_key), {}
    for name, uri in sets.items():
        dataset = Dataset.open(uri)
        said = dataset.header.provenance.get("watermark")
        if name != "real" and (said is None or said["key"] != key_name(secret)):
            continue
        count = min(MARKED, config.samples, dataset.header.num_samples)
        found[name] = survival(Reader(dataset, ["image"]).gather(np.arange(count))["image"], secret, CHANCE)
    return {"images": MARKED, "chance": CHANCE, "sets": found}


def _share(ids: np.ndarray, world: World, batch: int) -> list[np.ndarray]:
    mine = np.array_split(ids, world.world_size)[world.rank]
    return [mine[i : i + batch] for i in range(0, len(mine), batch)]
