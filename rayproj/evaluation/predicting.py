"""The best predictions of several models on images under obfuscations, as committed shards, and what is measured of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from rayproj import config as configuration
from rayproj.config import below
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.tfrecords import PublishedImages
from rayproj.data.writer import Sample
from rayproj.errors import UserError
from rayproj.evaluation import obfuscations as measured
from rayproj.evaluation.models import ExaminedConfig, open_classifier
from rayproj.obfuscation.registry import CLEAN, OBFUSCATIONS, ObfuscateConfig
from rayproj.storage.store import Store


@dataclass
class PredictConfig:
    """Which models, on which images, and how they are measured."""

    # A dataset of jobs/obfuscate.py, or a folder with the TFRecord files of the published benchmark.
    images: str = "???"
    part: str = "validation"  # of the published files
    out: str = "???"  # the predictions of a model go to <out>/<model>, and its CSV files to <out>/<model>/csv
    models: dict[str, ExaminedConfig] = field(default_factory=dict)  # name -> what it is
    predictions: dict[str, str] = field(default_factory=dict)  # name -> a folder with a CSV of each obfuscation
    # Groups of classes between which is chosen, by their mean probability: name -> classes. Images of others are left out.
    groups: dict[str, list[str]] = field(default_factory=dict)
    conflict_stimuli: bool = False  # the benchmark's 16 groups of ImageNet's classes
    label_weighted: bool = True  # every class counts as much as every other
    intervals: int = 200  # draws of the bootstrap; 0: none
    batch: int = 64

    def problems(self) -> list[str]:
        found = (
            [] if self.models or self.predictions else ["evaluate.models or evaluate.predictions must name something."]
        )
        found += below(0, "evaluate", self, "intervals") + below(1, "evaluate", self, "batch")
        if self.groups and self.conflict_stimuli:
            found.append("evaluate.groups and evaluate.conflict_stimuli are both groups of classes; choose one.")
        if self.predictions and (self.groups or self.conflict_stimuli):
            found.append(
                "evaluate.predictions are guesses among all classes: leave out the groups, or give the models."
            )
        if both := sorted(self.models.keys() & self.predictions.keys()):
            found.append(f"evaluate.predictions: '{both[0]}' is the name of a model too; give it another.")
        return found


def open_obfuscated(config: PredictConfig) -> Any:
    """The images, with `header` and `gather`.

    Raises:
        UserError: they are not there, or say nothing of obfuscations.
    """
    local = Store(config.images).local_path()
    if local is not None and Path(local).is_dir() and not (Path(local) / "dataset.json").exists():
        return PublishedImages(str(local), [CLEAN, *OBFUSCATIONS], config.part)
    reader: Any = Reader(Dataset.open(config.images))
    reader.header = reader.dataset.header
    if "obfuscation" not in reader.header.fields:
        raise UserError(f"'{config.images}' is no dataset of jobs/obfuscate.py; write one of it first.")
    return reader


def groups_of(config: PredictConfig, classes: tuple[str, ...]) -> dict[str, list[int]]:
    """The numbers of the classes of each group; {} where there are no groups.

    Raises:
        UserError: a class that the model does not have.
    """
    if config.conflict_stimuli:
        if len(classes) != 1000:
            raise UserError(
                f"evaluate.conflict_stimuli groups ImageNet's 1000 classes, and the model has {len(classes)}; give "
                "evaluate.groups instead."
            )
        return {name: list(group) for name, group in measured.CONFLICT_STIMULI.items()}
    known = {name: number for number, name in enumerate(classes)}
    for group, names in config.groups.items():
        if wrong := [name for name in names if name not in known]:
            raise UserError(f"evaluate.groups.{group} has '{wrong[0]}', which is no class of the model.")
    return {group: [known[name] for name in names] for group, names in config.groups.items()}


def header_of(config: PredictConfig, name: str) -> Header:
    """Of the predictions of one model, in the order of the images."""
    images: Header = open_obfuscated(config).header
    model = open_classifier(config.models[name], "cpu")
    groups = groups_of(config, model.classes)
    kept = min(measured.KEPT, len(groups or model.classes))
    fields = {
        "image_id": Field("str"),
        "obfuscation": images.fields["obfuscation"],
        "label": Field("int"),
        "top": Field("npy", (kept,)),
    }
    return Header(
        f"guesses of {name} on {images.name}", fields, images.num_samples, images.shard_size,
        tuple(groups) or model.classes, sizes=images.sizes,
        provenance={
            "images": config.images,
            "model": asdict(config.models[name]),
            "weights": model.digest,
            "groups": groups,
        },
    )  # fmt: skip


class Predictor:
    """Makes shards of predictions. Values: "config", as of `PredictConfig`, "model", its name, and "out"."""

    def __init__(self, values: dict[str, Any], device: str) -> None:
        self.config = configuration.from_dict(PredictConfig, values["config"])
        self.images, self.header = open_obfuscated(self.config), Dataset.open(values["out"]).header
        self.model = open_classifier(self.config.models[values["model"]], device)
        self.groups = list(groups_of(self.config, self.model.classes).values())
        self.label = torch.from_numpy(_numbers(self.images.header.classes, self.model.classes, values["model"]))
        self.device = device

    def make(self, shard: int) -> list[Sample]:
        numbers = np.asarray(self.header.shard_range(shard))
        found: list[Sample] = []
        for begin in range(0, len(numbers), self.config.batch):
            columns = self.images.gather(numbers[begin : begin + self.config.batch])
            scores = self.model(torch.from_numpy(columns["image"]).to(self.device)).double().cpu().numpy()
            label = self.label[columns["label"]].numpy()
            if self.groups:
                scores, label = measured.grouped(scores, self.groups), measured.in_groups(label, self.groups)
            top = measured.best(scores).astype(np.float32)  # npy fields are fp32, which holds these numbers
            for k, index in enumerate(columns["index"]):
                found.append(
                    {
                        "key": f"{index:08d}",
                        "image_id": str(columns["image_id"][k]),
                        "obfuscation": int(columns["obfuscation"][k]),
                        "label": int(label[k]),
                        "top": top[k],
                    }
                )
        return found


def _numbers(images: tuple[str, ...], model: tuple[str, ...], name: str) -> np.ndarray:
    """For each class of the images its number with the model: int64.

    Raises:
        UserError: they have neither the same names nor, under quite other names, the same number of classes.
    """
    if set(images) <= set(model):
        return np.array([model.index(c) for c in images], np.int64)
    if set(images) & set(model):
        lacking = next(c for c in images if c not in model)
        raise UserError(f"The model '{name}' has no class '{lacking}', which the images have; give one that has it.")
    if len(images) == len(model):
        return np.arange(len(images))
    raise UserError(
        f"The model '{name}' has {len(model)} classes and the images {len(images)} others; give a model of the same classes."
    )


def predictions_of(dataset: Dataset) -> dict[str, measured.Predictions]:
    """The predictions by obfuscation; without images that are in no group."""
    header = dataset.header
    columns = Reader(dataset).gather(np.arange(header.num_samples))
    inside, found = columns["label"] >= 0, {}
    for number, name in enumerate(header.fields["obfuscation"].values):
        here = inside & (columns["obfuscation"] == number)
        if here.any():
            image = columns["image_id"][here].astype(str)
            found[name] = measured.Predictions(image, columns["label"][here], columns["top"][here].astype(np.int64))
    return found


def result_of(config: PredictConfig) -> dict[str, Any]:
    """What is measured of all models; writes their CSV files where they are not of others.

    Returns:
        By model the metrics, their intervals, and the obfuscations that it was trained with; "models" is their order, and
        "apart" what not all have, which is in no mean.
    """
    names = [*config.models, *config.predictions]
    found: dict[str, Any] = {"models": names, "metrics": {}, "intervals": {}, "images": {}, "seen": {}}
    everything: dict[str, dict[str, measured.Predictions]] = {}
    for name in names:
        if name in config.predictions:
            predictions = measured.read_csvs(config.predictions[name], list(OBFUSCATIONS))
        else:
            dataset = Dataset.open(f"{config.out}/{name}")
            predictions = predictions_of(dataset)
            for obfuscation, p in predictions.items():
                dataset.store.write(f"csv/{obfuscation}.csv", measured.csv_of(p))
        everything[name] = predictions
    shared = set.intersection(*(set(predictions) for predictions in everything.values()))
    found["apart"] = [n for n in OBFUSCATIONS if n not in shared and any(n in p for p in everything.values())]
    for name, predictions in everything.items():
        weighted, draws = config.label_weighted, config.intervals
        found["metrics"][name] = measured.metrics(predictions, weighted, among=shared)
        found["intervals"][name] = measured.intervals(predictions, weighted, draws, among=shared) if draws else {}
        found["images"][name] = len(next(iter(predictions.values())).label)
        found["seen"][name] = trained_with(config.models[name].model) if name in config.models else []
    found["label_weighted"] = config.label_weighted
    return found


def trained_with(model: str) -> list[str]:
    """The obfuscations in the augmentation of a run of jobs/train_classifier.py; [] of any other model."""
    store = Store(model)
    if model.endswith(".onnx") or not store.exists("config.yaml"):
        return []
    values: Any = OmegaConf.to_container(OmegaConf.create(store.read("config.yaml").decode()))
    given = (values.get("augment") or {}).get("obfuscate")
    if not given:
        return []
    obfuscate = configuration.from_dict(ObfuscateConfig, given)
    return list(obfuscate.drawn) if obfuscate.share > 0 else []
