"""Epistemic networks beside each other, in distribution and where the images are others than those of training: corrupted,
of another style, of no class (Lu et al. 2022, "Robustness of Epinets against Distributional Shifts")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.classifiers.ensembles import BatchEnsemble, Ensemble
from rayproj.classifiers.epinet import EpistemicNetwork
from rayproj.classifiers.model import began_with, with_starts
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.engine.task import train_only
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation import epistemic
from rayproj.evaluation.corruptions import CORRUPTIONS, corrupted
from rayproj.evaluation.epistemic import Outcome, by_labels_together, fitted_temperature, logits_of, measures
from rayproj.evaluation.uncertainty import corruption_errors, detection
from rayproj.obfuscation.assets import Assets, AssetsConfig
from rayproj.obfuscation.base import SEVERITIES
from rayproj.obfuscation.registry import chosen, obfuscate
from rayproj.storage.store import Store

SEED = 0  # of the obfuscations that images are judged under


@dataclass
class ShiftConfig:
    """What to judge, on what."""

    networks: dict[str, str] = field(default_factory=dict)  # name -> run dir of jobs/train_classifier.py
    test: str = "???"  # labelled images like those of training
    validation: str = ""  # more of them, on which the temperature of each network is fitted; "": 1
    shifted: dict[str, str] = field(default_factory=dict)  # name -> images of the same classes that look otherwise
    # name -> runs of other classifiers: the test images that all of these get wrong, as ImageNet-A is what a ResNet-50 does
    # (Hendrycks et al. 2021). None of them is judged, nor began a run that is: it would be wrong by choice.
    hard: dict[str, list[str]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)  # name -> images of no class of the networks
    corruptions: list[str] = field(default_factory=lambda: list(CORRUPTIONS))  # of the test images
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES))
    obfuscations: list[str] = field(default_factory=list)  # of the test images: names, or sets such as held_out
    obfuscation_severities: list[int] = field(
        default_factory=list
    )  # of obfuscations, 1 to 5; []: over their whole ranges
    assets: AssetsConfig = field(default_factory=AssetsConfig)  # that these take
    baseline: str = ""  # the network by whose errors those of corrupted images are divided; "": the first
    # Numbers of indices with which each network is judged: as far as it has them, or as `most` says (name -> number).
    indices: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 10, 30, 100, 300, 1000])
    most: dict[str, int] = field(default_factory=dict)
    extrapolated: list[int] = field(
        default_factory=lambda: [30, 100]
    )  # members of ensembles whose cost follows from one's
    tau: int = 10  # labels whose joint probability is looked at
    kappa: int = 2  # anchors that they are drawn from
    samples: int = 1000  # images of each condition, at most
    batch: int = 128

    def problems(self) -> list[str]:
        found = [f"shift.{n} must be positive." for n in ("tau", "kappa", "samples", "batch") if getattr(self, n) < 1]
        unknown = sorted(set(self.corruptions) - set(CORRUPTIONS))
        found += [f"shift.corruptions has '{name}'; there are {', '.join(CORRUPTIONS)}." for name in unknown]
        if not set(self.severities) <= set(SEVERITIES):
            found.append("shift.severities lie in 1 to 5.")
        if not set(self.obfuscation_severities) <= set(SEVERITIES):
            found.append("shift.obfuscation_severities lie in 1 to 5.")
        try:
            chosen(self.obfuscations, self.assets)
        except UserError as error:
            found.append(f"shift.obfuscations: {error}")
        if not self.networks:
            found.append("shift.networks names no run.")
        for name, runs in self.hard.items():
            if not runs:
                found.append(f"shift.hard.{name} names no run.")
            judged = {run.rstrip("/") for run in self.networks.values()}
            found += [_own(name, run) for run in runs if run.rstrip("/") in judged]
        if self.baseline and self.baseline not in self.networks:
            found.append(f"shift.baseline='{self.baseline}' is not in shift.networks.")
        if not self.indices or min(self.indices) < 1:
            found.append("shift.indices must be positive numbers.")
        if min([*self.most.values(), *self.extrapolated], default=1) < 1:
            found.append("shift.most and shift.extrapolated must be positive numbers.")
        return found


def _own(name: str, run: str) -> str:
    return (
        f"shift.hard.{name}: '{run}' is judged itself, or began a run that is, which would be wrong of these images by "
        "choice; give the run of a classifier that was trained by itself."
    )


@dataclass(frozen=True)
class Condition:
    """Images under which the networks are judged.

    Attributes:
        family: "in_distribution", "shifted", "hard", "corrupted" or "obfuscated".
        change: uint8 images [B, C, H, W] and their rows [B, 3] to others; whatever else changes images goes here.
        ids: which images of the dataset; None: the first.
    """

    name: str
    family: str
    dataset: str
    change: Callable[[Tensor, Tensor], Tensor] = lambda images, row: images
    severity: int = 0
    ids: np.ndarray | None = None

    def images(self, config: ShiftConfig) -> np.ndarray:
        """Their numbers, at most `samples`."""
        if self.ids is not None:
            return self.ids[: config.samples]
        return np.arange(min(config.samples, Dataset.open(self.dataset).header.num_samples))


def conditions(config: ShiftConfig) -> Iterator[Condition]:
    """All with labels but the hard ones, those of the test images as they are first."""
    yield Condition("test", "in_distribution", config.test)
    for name, uri in config.shifted.items():
        yield Condition(name, "shifted", uri)
    for name in config.corruptions:
        for severity in config.severities:

            def change(images: Tensor, row: Tensor, name: str = name, severity: int = severity) -> Tensor:
                return corrupted(images.cpu(), row.cpu(), name, severity).to(images.device)

            yield Condition(f"{name} {severity}", "corrupted", config.test, change, severity)
    for name in chosen(config.obfuscations, config.assets):
        for severity in config.obfuscation_severities or [0]:

            def hide(images: Tensor, row: Tensor, name: str = name, severity: int = severity) -> Tensor:
                assets = Assets.load(config.assets, str(images.device))
                return obfuscate(name, images, row, SEED, assets, severity)[0]

            yield Condition(f"{name} {severity}" if severity else name, "obfuscated", config.test, hide, severity)


@torch.no_grad()
def hard_conditions(config: ShiftConfig, world: World) -> list[Condition]:
    """The test images that all references of a name get wrong; on every rank alike.

    Raises:
        UserError: a reference began a run that is judged, or too few images are left to be measured.
    """
    found, dataset = [], Dataset.open(config.test)
    for name, runs in config.hard.items():
        for run in runs:
            if any(run.rstrip("/") in with_starts(judged) for judged in config.networks.values()):
                raise UserError(_own(name, run))
        references, mine = [load(run, world.device) for run in runs], [np.zeros(0, np.int64)]
        for ids in _share(np.arange(dataset.header.num_samples), world, config.batch):
            images, labels = _images(dataset, ids, world)
            wrong = torch.stack([reference(images).argmax(1) != labels for reference in references]).all(0)
            mine.append(ids[wrong.cpu().numpy()])
        parts: list[Any] = [None] * world.world_size
        dist.all_gather_object(parts, np.concatenate(mine))
        ids, least = np.concatenate(parts), max(config.tau, config.kappa)
        if len(ids) < least:
            raise UserError(
                f"shift.hard.{name}: of {dataset.header.num_samples} test images the references get {len(ids)} wrong, and "
                f"{least} are needed; give weaker or fewer references, or more images in shift.test."
            )
        found.append(Condition(f"hard for {name}", "hard", config.test, ids=ids))
    return found


Outcomes = dict[tuple[str, int], Outcome]
"""By network and number of indices."""


class _Judges:
    """The networks, their indices, and the temperatures of their logits."""

    def __init__(self, config: ShiftConfig, world: World) -> None:
        self.config, self.world = config, world
        self.networks = {name: load(run, world.device) for name, run in config.networks.items()}
        self.counts = {name: self._counts(name, network) for name, network in self.networks.items()}
        self.z = {name: network.indices(self.counts[name][-1]) for name, network in self.networks.items()}
        self.temperatures = {(name, count): 1.0 for name, counts in self.counts.items() for count in counts}

    def _counts(self, name: str, network: EpistemicNetwork) -> list[int]:
        finite = isinstance(network, (Ensemble, BatchEnsemble))
        most = self.config.most.get(name, network.default_indices)
        most = min(most, network.default_indices) if finite else most
        return sorted({count for count in self.config.indices if count < most} | {most})

    @torch.no_grad()
    def fit(self, dataset: Dataset) -> None:
        """Temperatures, on the first images of a dataset; on every rank alike."""
        images, labels = _images(dataset, np.arange(min(self.config.samples, dataset.header.num_samples)), self.world)
        for name, network in self.networks.items():
            parts = [logits_of(network, some, self.z[name]) for some in images.split(self.config.batch)]
            logits = torch.cat(parts, 1)
            for count in self.counts[name]:
                self.temperatures[name, count] = fitted_temperature(logits[:count], labels)

    @torch.no_grad()
    def judge(self, condition: Condition) -> tuple[Outcomes, np.ndarray]:
        """What each says of the images, and their labels; the ranks share the images, and all get all."""
        dataset = Dataset.open(condition.dataset)
        found, truth = dict[tuple[str, int], list[Outcome]](), []
        for ids in _share(condition.images(self.config), self.world, self.config.batch):
            images, labels = _images(dataset, ids, self.world)
            row = torch.zeros(len(ids), 3, dtype=torch.int64, device=images.device)
            row[:, 0] = torch.from_numpy(ids)
            images = condition.change(images, row)
            truth.append(labels.cpu().numpy())
            for name, network in self.networks.items():
                logits = logits_of(network, images, self.z[name])
                for count in self.counts[name]:
                    one = Outcome.of(logits[:count], labels, self.temperatures[name, count])
                    found.setdefault((name, count), []).append(one)
        everything: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(everything, (found, truth))
        labels_of_all = np.concatenate([part for _, labels in everything for part in labels])
        names = [(name, count) for name, counts in self.counts.items() for count in counts]
        return {
            key: Outcome.joined([one for parts, _ in everything for one in parts.get(key, [])]) for key in names
        }, labels_of_all


def load(run: str, device: str) -> EpistemicNetwork:
    """The network of a run of jobs/train_classifier.py, of whose parameters those need a gradient that the run trained; a
    point estimate is an ensemble of one."""
    network = classifiers.load(run, device)
    fixed = network.fixed() if isinstance(network, EpistemicNetwork) else ()
    train_only(network, configuration.value(Store(run).read("config.yaml"), "trainable"), "trainable", fixed)
    return network if isinstance(network, EpistemicNetwork) else Ensemble([network]).eval()


def evaluate(config: ShiftConfig, world: World, link: Link) -> dict[str, Any]:
    """Every measure of every network with every number of its indices under every condition, and the costs.

    Raises:
        UserError: a run or dataset is not there.
    """
    all_conditions = list(conditions(config))
    if world.rank == 0:
        link.report({"type": "total", "steps": len(all_conditions) + len(config.hard) + len(config.unknown) + 1})
    classes = Dataset.open(config.test).header.classes
    for condition in all_conditions:
        if Dataset.open(condition.dataset).header.classes != classes:
            raise UserError(
                f"The classes of shift.shifted.{condition.name} are not those of shift.test, in their order: "
                f"{', '.join(classes)}."
            )
    hard = hard_conditions(config, world)
    all_conditions += hard
    done, judges = 0, _Judges(config, world)
    if config.validation:
        judges.fit(Dataset.open(config.validation))
    found: dict[str, Any] = {name: {str(c): {} for c in counts} for name, counts in judges.counts.items()}
    together: dict[str, Any] = {}
    known: Outcomes = {}
    sizes = {}
    for condition in all_conditions:
        outcomes, labels = judges.judge(condition)
        known, sizes[condition.name] = known or outcomes, len(labels)
        for (name, count), outcome in outcomes.items():
            found[name][str(count)][condition.name] = measures(outcome, labels, config.tau, config.kappa)
            if condition.family == "in_distribution":
                together.setdefault(name, {})[str(count)] = by_labels_together(outcome)
        done += 1
        if world.rank == 0:
            shown = {n: found[n][str(c[-1])][condition.name]["dyadic_nll_exact"] for n, c in judges.counts.items()}
            link.report({"type": "metrics", "step": done, **{f"dyadic_nll/{n}": v for n, v in shown.items()}})
    detected: dict[str, Any] = {name: {str(c): {} for c in counts} for name, counts in judges.counts.items()}
    for unknown, uri in config.unknown.items():
        outcomes, _ = judges.judge(Condition(unknown, "unknown", uri))
        for (name, count), outcome in outcomes.items():
            pairs = {score: detection(known[name, count].scores[score], v) for score, v in outcome.scores.items()}
            detected[name][str(count)][unknown] = pairs
        done += 1
    return {
        "tau": config.tau,
        "kappa": config.kappa,
        "conditions": [
            {"name": c.name, "family": c.family, "severity": c.severity, "n": sizes[c.name]} for c in all_conditions
        ],
        "hard": {
            c.name: {"references": list(runs), "n": sizes[c.name]}
            for c, runs in zip(hard, config.hard.values(), strict=True)
        },
        "temperatures": {
            name: {str(c): judges.temperatures[name, c] for c in counts} for name, counts in judges.counts.items()
        },
        "measures": found,
        "labels_together": together,
        "corruption_errors": _corruption_errors(config, judges, found),
        "unknown": detected,
        "costs": _costs(config, judges) if world.rank == 0 else None,
    }


def _corruption_errors(config: ShiftConfig, judges: _Judges, found: dict[str, Any]) -> dict[str, Any]:
    if not config.corruptions or not config.severities:
        return {}

    def errors(name: str, count: int) -> dict[str, list[float]]:
        by = found[name][str(count)]
        return {c: [1 - by[f"{c} {s}"]["accuracy"] for s in config.severities] for c in config.corruptions}

    baseline = config.baseline or next(iter(config.networks))
    theirs = errors(baseline, judges.counts[baseline][-1])
    by = {
        name: {str(c): corruption_errors(errors(name, c), theirs) for c in counts}
        for name, counts in judges.counts.items()
    }
    return {"baseline": baseline, "severities": list(config.severities), "networks": by}


def _costs(config: ShiftConfig, judges: _Judges) -> list[dict[str, Any]]:
    """A row for each network and number of indices: parameters; operations of training, with what was trained before it,
    and of predicting an image; seconds of the latter, measured here."""
    dataset, rows = Dataset.open(config.test), []
    images, _ = _images(dataset, np.arange(min(config.batch, dataset.header.num_samples)), judges.world)
    for name, network in judges.networks.items():
        for count in judges.counts[name]:
            cost: dict[str, Any] = {"training_flops": _training_flops(config.networks[name], images, count)}
            cost |= epistemic.parameters(network, count) | epistemic.inference_cost(network, images, count)
            rows.append({"network": name, "indices": count, "extrapolated": False, **cost})
        if isinstance(network, Ensemble) and len(network.members) > 1:  # the last row is of the most members
            for more_members in config.extrapolated:
                more = {key: value * more_members / count for key, value in cost.items()}
                rows.append({"network": name, "indices": more_members, "extrapolated": True, **more})
    return rows


def _training_flops(run: str, images: Tensor, count: int) -> float:
    """Of a whole run, with that many of its members if it is an ensemble, and of the runs that it began with."""
    train = configuration.value(Store(run).read("config.yaml"), "train")
    network = epistemic.with_indices(load(run, str(images.device)), count).train()
    own = epistemic.training_flops(network, images) * train["steps"] * train["batch"]
    return own + sum(_training_flops(before, images, 1) for before in began_with(run))


def _images(dataset: Dataset, ids: np.ndarray, world: World) -> tuple[Tensor, Tensor]:
    """Images and labels of these samples."""
    if "label" not in dataset.header.fields:
        raise UserError(f"{dataset.uri} has no labels; give a labelled dataset.")
    batch = Reader(dataset, ["image", "label"]).gather(ids)
    return torch.from_numpy(batch["image"]).to(world.device), torch.from_numpy(batch["label"]).to(world.device)


def _share(ids: np.ndarray, world: World, batch: int) -> list[np.ndarray]:
    mine = np.array_split(ids, world.world_size)[world.rank]
    return [mine[i : i + batch] for i in range(0, len(mine), batch)]
