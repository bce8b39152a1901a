"""Classifiers and defences under attack: every image attacked once, whoever does it, and the tables of what came of it.

What is written is a dataset: of each test image, what broke it under each threat, and the broken image. All measures are
sums over it, so that none needs the model again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.classifiers.adversary import ThreatConfig
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.engine.checkpoint import commits
from rayproj.errors import UserError
from rayproj.evaluation.proportions import Rate
from rayproj.robustness import adaptive, defences
from rayproj.robustness.adaptive import AdaptiveConfig, Cost, Probe
from rayproj.robustness.apgd import apgd
from rayproj.robustness.autoattack import AttackConfig, autoattack
from rayproj.robustness.defences import Defence
from rayproj.robustness.losses import cross_entropy
from rayproj.robustness.ode import StableODE
from rayproj.robustness.oracle import Model, OfUnit, Oracle
from rayproj.robustness.score import trained_score
from rayproj.robustness.threats import Norm, Threat, size
from rayproj.storage.store import Store

COLUMNS = ("clean", "static", "defended", "transfer", "direct", "bpda", "fewer", "square", "rays")
SEARCHES = ("square", "rays")  # columns of attacks that ask for queries


class DefenceKind(Enum):
    anti_adversary = "anti_adversary"
    hedge = "hedge"
    auxiliary = "auxiliary"
    one_step = "one_step"
    self_supervised = "self_supervised"
    contrastive = "contrastive"
    control = "control"
    entropy = "entropy"
    noise = "noise"
    generative = "generative"
    score = "score"
    ode = "ode"
    quantiser = "quantiser"


CLASSES: dict[DefenceKind, Callable[..., Defence]] = {
    DefenceKind.anti_adversary: defences.AntiAdversary,
    DefenceKind.hedge: defences.Hedge,
    DefenceKind.auxiliary: defences.AuxiliaryPurifier,
    DefenceKind.one_step: defences.OneStep,
    DefenceKind.self_supervised: defences.SelfSupervised,
    DefenceKind.contrastive: defences.ContrastiveReversal,
    DefenceKind.control: defences.ClosedLoopControl,
    DefenceKind.entropy: defences.EntropyAdaptation,
    DefenceKind.noise: defences.RandomNoise,
    DefenceKind.generative: defences.GenerativePurifier,
    DefenceKind.score: defences.ScorePurifier,
    DefenceKind.ode: defences.StableEquilibria,
    DefenceKind.quantiser: defences.Quantiser,
}
FROM_IMAGES = (
    DefenceKind.auxiliary,
    DefenceKind.one_step,
    DefenceKind.contrastive,
    DefenceKind.control,
    DefenceKind.score,
    DefenceKind.ode,
)


@dataclass
class DefenceConfig:
    """A defence around one of the classifiers."""

    base: str = "???"  # name in `classifiers`
    kind: DefenceKind = DefenceKind.anti_adversary
    # Of its class, such as {steps: 4}; `training`: the steps by which what it has of `images` is trained.
    options: dict[str, float] = field(default_factory=dict)
    model: str = ""  # generative: run dir of a diffusion model
    images: str = ""  # auxiliary, one_step, contrastive, control, score, ode: what they learn from


@dataclass
class RobustnessConfig:
    """What to attack, how."""

    test: str = ""  # images with labels
    out: str = ""  # where the attacked images go: <out>/<name>
    classifiers: dict[str, str] = field(default_factory=dict)  # name -> run dir
    defences: dict[str, DefenceConfig] = field(default_factory=dict)  # name -> which, around what
    threats: dict[str, ThreatConfig] = field(default_factory=dict)  # {}: linf 8/255, l2 0.5 and l1 12
    attack: AttackConfig = field(default_factory=AttackConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)  # of defences
    radii: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])  # of a threat, by APGD alone
    examples: int = 1000
    shard_size: int = 50

    def problems(self) -> list[str]:
        found = [f"robustness.{n} must be positive." for n in ("examples", "shard_size") if getattr(self, n) <= 0]
        if any(radius <= 0 for radius in self.radii):
            found.append("robustness.radii must be positive.")
        if self.classifiers and not (self.test and self.out):
            found.append("robustness.classifiers need robustness.test, and robustness.out for what is found.")
        unknown = sorted({d.base for d in self.defences.values()} - set(self.classifiers))
        if unknown:
            found.append(f"robustness.defences stand on '{unknown[0]}', which robustness.classifiers has not.")
        twice = sorted(set(self.defences) & set(self.classifiers))
        return [*found, f"robustness: '{twice[0]}' is a classifier and a defence."] if twice else found

    @property
    def balls(self) -> dict[str, Threat]:
        """The threats by name; by default those that are common for images of 32 pixels (Croce and Hein 2021)."""
        given = {name: threat.threat for name, threat in self.threats.items()}
        return given or {"linf": Threat(Norm.linf, 8 / 255), "l2": Threat(Norm.l2, 0.5), "l1": Threat(Norm.l1, 12.0)}

    @property
    def attacked(self) -> dict[str, DefenceConfig | None]:
        """Everything that is attacked, with its defence."""
        return {**dict.fromkeys(self.classifiers), **self.defences}


def header_of(config: RobustnessConfig, name: str, seed: int) -> Header:
    """Of the dataset of one classifier's or defence's attacked images.

    Raises:
        UserError: the classifier has no commit, or the test images none to attack.
    """
    test, defence = Dataset.open(config.test).header, config.attacked[name]
    run = Store(config.classifiers[defence.base if defence else name])
    done = commits(run)
    if not done:
        raise UserError(f"There is no trained classifier at '{run.uri}'; give the run dir of jobs/train_classifier.py.")
    shape = test.fields["image"].shape
    fields = {"label": Field("int"), "prediction": Field("int")}
    for threat in config.balls:
        fields |= {
            f"{threat}_image": Field("npy", shape),
            f"{threat}_by": Field("str"),
            f"{threat}_size": Field("float"),
        }
        names = [f"at_{k}" for k in range(len(config.adaptive.radii if defence else config.radii))]
        if defence:
            names += [*COLUMNS, *(f"{name}_queries" for name in SEARCHES)]
            names += [f"with_{k}" for k in range(len(steps_of(config, defence)))]
        fields |= {f"{threat}_{name}": Field("int") for name in names}
    # What the others are, and how defences are attacked, is no matter here: what is there stays where that changes.
    own, adaptive = ({name: defence}, config.adaptive) if defence else ({}, AdaptiveConfig())
    values = configuration.to_dict(replace(config, defences=own, adaptive=adaptive))
    provenance = {
        "classifier": run.uri,
        "commit": done[-1].step,
        **(_needed(defence) if defence else {}),
        "name": name,
        "seed": seed,
        "robustness": {k: v for k, v in values.items() if k not in ("classifiers", "out")},
    }
    count = min(config.examples, test.num_samples)
    told: dict[str, Any] = {"licence": test.licence, "attribution": test.attribution, "provenance": provenance}
    return Header(f"{test.name}, attacked", fields, count, config.shard_size, test.classes, **told)


def _needed(defence: DefenceConfig) -> dict[str, Any]:
    """What else a defence is made of, as it is now: half of the images attacked behind another one would be no result.

    Raises:
        UserError: it is not there.
    """
    if defence.kind is DefenceKind.generative and defence.model:
        done = commits(Store(defence.model))
        if not done:
            raise UserError(
                f"There is no diffusion model at '{defence.model}'; give the run dir of jobs/train_diffusion.py."
            )
        return {"model_commit": done[-1].step}
    if defence.kind in FROM_IMAGES and defence.images:
        return {"images": Dataset.open(defence.images).manifest_hash()}
    return {}


class Attacker:
    """Attacks the images of one shard, a function of the header and the shard's number. Config key: "out"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.dataset, self.device = Dataset.open(config["out"]), device
        said = self.dataset.header.provenance
        self.config = configuration.from_dict(RobustnessConfig, said["robustness"])
        self.seed, self.defence = int(said["seed"]), self.config.defences.get(said["name"])
        torch.backends.cudnn.allow_tf32 = False  # attacks are in fp32, the convolutions of a GPU too
        self.model: Model = OfUnit(classifiers.load(said["classifier"], device))
        self.build: Callable[[Model], Defence] | None = None
        if self.defence:
            self.build = builder(self.defence, self.config, self.model, device, self.seed)
        self.reader = Reader(Dataset.open(self.config.test), ["image", "label"])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.dataset.header.shard_range(shard))
        batch = self.reader.gather(ids)
        x = torch.from_numpy(batch["image"]).to(self.device).float() / 255
        label, number = (torch.from_numpy(v).to(self.device) for v in (batch["label"], ids))
        found = [{"key": f"{i:08d}", "label": int(y)} for i, y in zip(ids, batch["label"], strict=True)]
        self._add(found, "prediction", self.model(x).argmax(1))
        for name, threat in self.config.balls.items():
            part = self._defended if self.defence else self._plain
            images = part(found, name, threat, x, label, number)
            self._add(found, f"{name}_size", size(images - x, threat.norm))
            self._add(found, f"{name}_image", images)
        return found

    def _plain(
        self, found: list[dict[str, Any]], name: str, threat: Threat, x: Tensor, label: Tensor, ids: Tensor
    ) -> Tensor:
        result = autoattack(self.model, x, label, ids, threat, self.config.attack, self.seed)
        for sample, by in zip(found, result.by, strict=True):
            sample[f"{name}_by"] = by
        right = self.model(x).argmax(1) == label
        for k, radius in enumerate(self.config.radii):
            row = torch.stack([ids, torch.full_like(ids, k), torch.full_like(ids, 60)], 1)
            there = Threat(threat.norm, radius * threat.eps)
            steps = self.config.attack.steps
            broken = apgd(Oracle(self.model), x, label, row, there, cross_entropy, steps, self.seed).broken
            self._add(found, f"{name}_at_{k}", (right & ~broken).int())
        return result.images

    def _defended(
        self, found: list[dict[str, Any]], name: str, threat: Threat, x: Tensor, label: Tensor, ids: Tensor
    ) -> Tensor:
        assert self.defence and self.build
        tried = (self.config.attack, self.config.adaptive, self.seed)
        verdict = adaptive.evaluate(self.build, self.model, x, label, ids, threat, *tried)
        for column in COLUMNS:
            self._add(found, f"{name}_{column}", verdict.correct[column].int())
        for column, queries in verdict.queries.items():
            self._add(found, f"{name}_{column}_queries", queries)
        for k, radius in enumerate(self.config.adaptive.radii):
            there = Threat(threat.norm, radius * threat.eps)
            held = adaptive.withstood(self.build(self.model), self.model, x, label, ids, there, *tried[1:])
            self._add(found, f"{name}_at_{k}", held.int())
        for k, steps in enumerate(steps_of(self.config, self.defence)):
            other = self.build(self.model)
            other.steps = steps
            held = adaptive.withstood(other, self.model, x, label, ids, threat, *tried[1:])
            self._add(found, f"{name}_with_{k}", held.int())
        first = [next((c for c in COLUMNS[2:] if not verdict.correct[c][i]), "") for i in range(len(x))]
        for sample, by in zip(found, first, strict=True):
            sample[f"{name}_by"] = by
        return verdict.images

    @staticmethod
    def _add(found: list[dict[str, Any]], name: str, values: Tensor) -> None:
        for sample, value in zip(found, values.detach().cpu(), strict=True):
            sample[name] = value.numpy() if value.dim() else value.item()


def builder(
    defence: DefenceConfig, config: RobustnessConfig, base: Model, device: str, seed: int
) -> Callable[[Model], Defence]:
    """What builds a defence around a base.

    Raises:
        UserError: an option that it has not, or what it needs is not given.
    """
    options, kind = dict(defence.options), CLASSES[defence.kind]
    if defence.kind is DefenceKind.generative:
        if not defence.model:
            raise UserError(
                "A generative defence needs robustness.defences.NAME.model: the run dir of a diffusion model."
            )
        redraw = Redraw(defence.model, device, **_given(Redraw, options))
        return lambda model: defences.GenerativePurifier(model, redraw, seed)
    training = {}
    if defence.kind in FROM_IMAGES and defence.kind is not DefenceKind.control and "training" in options:
        training["steps"] = int(options.pop("training"))
    given = {"seed": seed} if "seed" in inspect.signature(kind).parameters else {}
    given |= _given(kind, options)
    if defence.kind in FROM_IMAGES:
        if not defence.images:
            raise UserError(
                f"A defence of the kind '{defence.kind.value}' needs robustness.defences.NAME.images, to learn from."
            )
        told: Any
        told, label = _some(defence.images, device)
        if defence.kind is DefenceKind.contrastive:
            told = defences.Contrast(_with_features(base), told, seed=seed, **training)
        elif defence.kind is DefenceKind.control:
            _with_features(base)
        elif defence.kind is DefenceKind.score:
            told = trained_score(told, seed=seed, **training)
        elif defence.kind is DefenceKind.ode:
            told = StableODE(_with_features(base), told, label, seed=seed, **training)
        else:
            told = discriminator(told, label, base, next(iter(config.balls.values())), seed, **training)
        return lambda model: kind(model, told, **given)
    return lambda model: kind(model, **given)


def _with_features(base: Model) -> OfUnit:
    """The base, if it says what its head sees.

    Raises:
        UserError: it does not.
    """
    if not isinstance(base, OfUnit) or not hasattr(base.network, "pooled"):
        raise UserError(
            "A contrastive, control or ode defence needs a classifier of one network, whose features are known."
        )
    return base


def steps_of(config: RobustnessConfig, defence: DefenceConfig) -> list[int]:
    """Numbers of its own steps with which a defence is attacked, for the curve."""
    return config.adaptive.defence_steps if "steps" in inspect.signature(CLASSES[defence.kind]).parameters else []


def _given(kind: Callable[..., Any], options: dict[str, float]) -> dict[str, Any]:
    """Options as the class takes them, whole numbers where it wants some."""
    parameters = inspect.signature(kind).parameters
    known = {n: p.default for n, p in parameters.items() if isinstance(p.default, int | float)}
    if wrong := sorted(set(options) - set(known)):
        raise UserError(f"A defence of this kind has no option '{wrong[0]}'; it has {', '.join(known)}.")
    return {name: type(known[name])(value) for name, value in options.items()}


def _some(images: str, device: str, count: int = 512) -> tuple[Tensor, Tensor]:
    """The first images of a dataset, fp32 [n, C, H, W] in [0, 1], and their labels."""
    dataset = Dataset.open(images)
    batch = Reader(dataset, ["image", "label"]).gather(np.arange(min(count, dataset.header.num_samples)))
    return torch.from_numpy(batch["image"]).to(device).float() / 255, torch.from_numpy(batch["label"]).to(device)


def discriminator(x: Tensor, label: Tensor, base: Model, threat: Threat, seed: int, steps: int = 200) -> Model:
    """A small network that tells images from what APGD makes of them for the base."""
    ids = torch.arange(len(x), device=x.device)
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 70)], 1)
    attacked = apgd(Oracle(base), x, label, row, threat, cross_entropy, 10, seed, go_on=True).images
    return defences.trained_discriminator(x, attacked, steps, seed)


class Redraw:
    """Images noised and drawn again by one of our diffusion models, without a condition.

    Args:
        noise: how far along the path, 1 being noise alone.
    """

    def __init__(self, run_dir: str, device: str, noise: float = 0.3, steps: int = 8) -> None:
        from rayproj.diffusion.sampling import SamplerConfig
        from rayproj.diffusion.task import TrainedModel

        self.model, self.noise = TrainedModel(run_dir, device), noise
        self.config = SamplerConfig(steps=steps, guidance=1.0)

    def __call__(self, x: Tensor, seed: int) -> Tensor:
        images = (255 * x).round().to(torch.uint8)
        return (
            self.model.redraw(images, torch.arange(len(x), device=x.device), seed, self.config, self.noise).float()
            / 255
        )


def summary(dataset: Dataset, cost: Cost | None = None, probes: Mapping[str, Probe] | None = None) -> dict[str, Any]:
    """The tables of one classifier or defence, from its attacked images.

    Args:
        cost, probes: of a defence, the latter by threat; without them there is no checklist.

    Returns:
        "clean" accuracy, of a defence its own; by threat "robust" accuracy, the share broken "by" each attack, the "curve"
        over the radii, and of a defence its "columns", what is right after "queries" of either search and with
        "defence_steps" of its own, and the checklist; "union": right under all threats. Accuracies have "value", "low" and
        "high" (95 %, Clopper and Pearson 1934) and "n".
    """
    header = dataset.header
    config = configuration.from_dict(RobustnessConfig, header.provenance["robustness"])
    defence = config.defences.get(header.provenance["name"])
    small = [name for name, known in header.fields.items() if not known.array]
    columns = Reader(dataset, small).gather(np.arange(header.num_samples))
    right_without = columns["prediction"] == columns["label"]
    if defence:  # whose prediction the base's is not
        right_without = columns[f"{next(iter(config.balls))}_defended"].astype(bool)
    found: dict[str, Any] = {"clean": share(right_without), "threats": {}}
    union = np.ones(header.num_samples, bool)
    for name, threat in config.balls.items():
        by = columns[f"{name}_by"].astype(str)
        union &= by == ""
        one: dict[str, Any] = {
            "threat": asdict(threat) | {"norm": threat.norm.value},
            "robust": share(by == ""),
            "by": {str(kind): float(np.mean(by == kind)) for kind in np.unique(by[by != ""])},
        }
        if defence:
            right = {c: columns[f"{name}_{c}"].astype(bool) for c in COLUMNS}
            one["columns"] = {c: share(values) for c, values in right.items()}
            one["queries"] = {c: _by_queries(columns[f"{name}_{c}_queries"], config) for c in SEARCHES}
            steps = steps_of(config, defence)
            held = [share(columns[f"{name}_with_{k}"].astype(bool)) for k in range(len(steps))]
            one["defence_steps"] = [{"steps": n, **h} for n, h in zip(steps, held, strict=True)]
        radii = config.adaptive.radii if defence else config.radii
        held = [share(columns[f"{name}_at_{k}"].astype(bool)) for k in range(len(radii))]
        one["curve"] = [{"radius": r * threat.eps, **h} for r, h in zip(radii, held, strict=True)]
        if cost and probes:
            curve = [(point["radius"], point["value"]) for point in one["curve"]]
            # Of one that draws the search by scores is judged at its end alone.
            judged = [c for c in SEARCHES if probes[name].apart is not None or c != "square"]
            queries = {c: columns[f"{name}_{c}_queries"] for c in judged}
            checks = adaptive.checklist(right, probes[name], cost, curve, queries, config.adaptive)
            one |= {"probe": asdict(probes[name]), "checklist": [asdict(check) for check in checks]}
        found["threats"][name] = one
    found["union"] = share(union)
    return found | ({"cost": asdict(cost)} if cost else {})


def _by_queries(queries: np.ndarray, config: RobustnessConfig) -> list[dict[str, float]]:
    """What a search had left after so many queries, which `Verdict.queries` says."""
    budgets = np.unique([0, *np.geomspace(1, config.adaptive.queries, 12).round().astype(int)])
    return [{"queries": int(q), **share((queries < 0) | (queries > q))} for q in budgets]


def share(right: np.ndarray) -> dict[str, float]:
    """How many are right, with the interval of Clopper and Pearson."""
    count, n = int(right.sum()), len(right)
    if not n:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    low, high = Rate(count, n).interval()
    return {"value": count / n, "low": low, "high": high, "n": n}
