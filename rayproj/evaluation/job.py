"""Judge classifiers on real test images, and synthetic datasets against real ones."""

from __future__ import annotations

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
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.frechet import FeatureStatistics, frechet_distance
from rayproj.evaluation.skewsize import skewsize


@dataclass
class EvaluateConfig:
    """What to judge, on what."""

    test: str = "???"  # real images with labels that no training has seen
    reference: str = "???"  # real images that synthetic ones are compared with
    classifiers: dict[str, str] = field(default_factory=dict)  # name -> run dir
    synthetic: dict[str, str] = field(default_factory=dict)  # name -> dataset
    samples: int = 1000  # images of each set in the Fréchet distance, which depends on their number
    feature_size: int = 64  # side to which images are resized for the feature extractor
    batch: int = 128
    group: str = ""  # an attribute of the test images: SkewSize of each classifier over it


def evaluate(config: EvaluateConfig, world: World, link: Link) -> dict[str, Any]:
    """Accuracy and confusion of each classifier, the Fréchet distance of each synthetic set; ranks share the images.

    The distance between the test images and the reference, two sets of real images, is given as "real": no generator
    can be expected below it at this number of samples.

    Raises:
        UserError: a run or dataset is not there, or too small.
    """
    tasks = len(config.classifiers) + len(config.synthetic) + 2
    if world.rank == 0:
        link.report({"type": "total", "steps": tasks})
    progress = _Progress(world, link)
    test = Dataset.open(config.test)
    confusion, groups = {}, {}
    for name, run in config.classifiers.items():
        labels, predictions, attribute = _predict(config, test, run, world)
        confusion[name] = confusion_matrix(labels, predictions, len(test.header.classes))
        if config.group:
            groups[name] = skewsize(labels, predictions, attribute, test.header.classes)
        progress.add(**{f"accuracy/{name}": accuracy(confusion[name])["value"]})
    distance = {}
    extractor = EfficientNetLite0Features(config.feature_size, world.device)
    reference = _features(config, Dataset.open(config.reference), extractor, world)
    progress.add()
    for name, uri in {"real": config.test, **config.synthetic}.items():
        distance[name] = frechet_distance(reference, _features(config, Dataset.open(uri), extractor, world))
        progress.add(**{f"frechet_distance/{name}": distance[name]})
    found = {name: accuracy(matrix) for name, matrix in confusion.items()}
    if world.rank == 0:
        rows = [[name, *values.values()] for name, values in found.items()]
        columns = ["classifier", *next(iter(found.values()), {})]
        link.report({"type": "table", "name": "accuracy", "columns": columns, "rows": rows})
    return {
        "classes": list(test.header.classes),
        "accuracy": found,
        "confusion": {name: matrix.tolist() for name, matrix in confusion.items()},
        "quality": {"feature_extractor": extractor.name, "samples": config.samples, "frechet_distance": distance},
        "skewsize": groups or None,
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions and group values of all test images, on every rank."""
    model = classifiers.load(run, world.device)
    if config.group and config.group not in test.header.fields:
        raise UserError(f"{test.uri} has no attribute '{config.group}'; it has {', '.join(test.header.fields)}.")
    reader = Reader(test, fields=["image", "label", *([config.group] if config.group else [])])
    found = []
    for ids in _share(np.arange(test.header.num_samples), world, config.batch):
        batch = reader.gather(ids)
        predicted = model(torch.from_numpy(batch["image"]).to(world.device)).argmax(1).cpu().numpy()
        found.append((batch["label"], predicted, batch[config.group].astype(str) if config.group else batch["label"]))
    everything: list[Any] = [None] * world.world_size
    dist.all_gather_object(everything, found)
    columns = list(zip(*[part for parts in everything for part in parts], strict=True))
    return tuple(np.concatenate(column) for column in columns)  # type: ignore[return-value]


def _features(
    config: EvaluateConfig, dataset: Dataset, extractor: EfficientNetLite0Features, world: World
) -> FeatureStatistics:
    """Statistics of the features of the first `samples` images, on every rank."""
    if dataset.header.num_samples < config.samples:
        raise UserError(
            f"{dataset.uri} has {dataset.header.num_samples} images, fewer than evaluate.samples={config.samples}; "
            "the distance needs equal numbers: lower evaluate.samples."
        )
    reader, d = Reader(dataset, fields=["image"]), extractor.dimensions
    sums = torch.zeros(d * d + d + 1, dtype=torch.float64)
    for ids in _share(np.arange(config.samples), world, config.batch):
        part = FeatureStatistics.of(extractor(torch.from_numpy(reader.gather(ids)["image"])).cpu().numpy())
        sums += torch.from_numpy(np.concatenate([part.outer.ravel(), part.total, [part.n]]))
    sums = sums.to(world.device)
    dist.all_reduce(sums)
    values = sums.cpu().numpy()
    return FeatureStatistics(int(values[-1]), values[d * d : -1], values[: d * d].reshape(d, d))


def _share(ids: np.ndarray, world: World, batch: int) -> list[np.ndarray]:
    mine = np.array_split(ids, world.world_size)[world.rank]
    return [mine[i : i + batch] for i in range(0, len(mine), batch)]
