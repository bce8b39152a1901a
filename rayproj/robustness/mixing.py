"""Soups of classifiers: every candidate mixture judged on the same images, without an attack and under each threat.

What is written is a dataset: of each image one digit for each candidate, 1 where that is right, and for soups that were
learned, and as much of the members' ensemble, which costs their number of passes where a soup costs one. Whatever is to be
chosen or plotted follows from these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj.classifiers.adapters import Adapted
from rayproj.classifiers.adversary import ThreatConfig
from rayproj.classifiers.model import of_run
from rayproj.classifiers.soups import Learned, Stack, Weights, barrier, few_shot, greedy, grid, learned, soup
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.engine.checkpoint import commits
from rayproj.errors import UserError
from rayproj.evaluation.corruptions import CORRUPTIONS, corrupted
from rayproj.evaluation.proportions import sign_test
from rayproj.obfuscation.base import SEVERITIES
from rayproj.robustness.apgd import apgd
from rayproj.robustness.job import share
from rayproj.robustness.losses import cross_entropy, targeted
from rayproj.robustness.oracle import Model, Oracle
from rayproj.robustness.threats import Threat
from rayproj.storage.store import Store, from_json, to_json

CLEAN, ENSEMBLE = "clean", "ensemble"
MOST = 6  # members of which every even mixture is a candidate too


@dataclass
class LearnConfig:
    """Soups whose weights are learned: of each set on images of its own that are not judged."""

    how: list[Learned] = field(default_factory=list)
    shots: int = 100  # labelled images
    steps: int = 50  # of L-BFGS on their cross-entropy

    def problems(self) -> list[str]:
        return [f"soup.learn.{name} must be positive." for name in ("shots", "steps") if getattr(self, name) <= 0]


@dataclass
class SoupConfig:
    """Which classifiers to mix, on a grid of weights, and on what to judge them."""

    members: dict[str, str] = field(
        default_factory=dict
    )  # name -> run dir; one with adapters is its branches: name:clean, name:adversarial
    test: str = "???"  # images with labels
    out: str = "???"  # where what is found goes: <out>/<set>
    # For the choice by few images of a shifted set: other images of these classes, and corruptions of the test images.
    shifts: dict[str, str] = field(default_factory=dict)
    corruptions: list[str] = field(default_factory=list)
    severity: int = 3
    threats: dict[str, ThreatConfig] = field(default_factory=dict)
    parts: int = 10  # weights are multiples of one over so many
    beyond: float = 0.0  # how far weights may leave [0, 1]
    learn: LearnConfig = field(default_factory=LearnConfig)
    steps: int = 20  # of APGD on the cross-entropy, and of one towards the likeliest other class
    shots: list[int] = field(default_factory=lambda: [10, 50, 200])
    examples: int = 500
    shard_size: int = 25

    def problems(self) -> list[str]:
        names = ("parts", "steps", "examples", "shard_size")
        found = [f"soup.{name} must be positive." for name in names if getattr(self, name) <= 0]
        if any(shots < 1 for shots in self.shots):
            found.append("soup.shots must be positive.")
        if not self.members:
            found.append("soup.members is empty.")
        unknown = sorted(set(self.corruptions) - set(CORRUPTIONS))
        found += [f"soup.corruptions has '{name}'; there are {', '.join(CORRUPTIONS)}." for name in unknown]
        if self.severity not in SEVERITIES:
            found.append(f"soup.severity is one of {SEVERITIES}, not {self.severity}.")
        if twice := sorted({"test", *self.corruptions} & set(self.shifts)):
            found.append(f"soup.shifts: another set is called '{twice[0]}'.")
        return found if self.beyond >= 0 else [*found, f"soup.beyond must not be negative, not {self.beyond:g}."]

    @property
    def sets(self) -> dict[str, tuple[str, str]]:
        """Name -> images, and what they are corrupted by; the test set first."""
        found = {name: (uri, "") for name, uri in {"test": self.test, **self.shifts}.items()}
        return found | {name: (self.test, name) for name in self.corruptions}


def members_of(config: SoupConfig, images: Header) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A network, and its weights in each member, in the order of the names.

    Raises:
        UserError: a run is not there, or they are not of one kind.
    """
    states: dict[str, dict[str, Tensor]] = {}
    network: nn.Module | None = None
    for name, run in sorted(config.members.items()):
        one = of_run(run, images)
        if isinstance(one, Adapted):
            ends = zip(one.names, torch.eye(len(one.names)), strict=True)
            parts = {f"{name}:{end}": one.merged(mix) for end, mix in ends}
        else:
            parts = {name: one}
        for part, module in parts.items():
            network, states[part] = module, module.state_dict()
    assert network is not None
    first = next(iter(states))
    for name, state in states.items():
        if set(state) != set(states[first]) or any(state[n].shape != states[first][n].shape for n in state):
            raise UserError(f"soup.members: '{name}' is another network than '{first}'; soups are of copies of one.")
    return network.eval().requires_grad_(False), states


def candidates(config: SoupConfig, count: int) -> np.ndarray:
    """Weights [n, count]: each member alone, even mixtures of few members, and the grid."""
    even = [
        [(i in some) / size for i in range(count)]
        for size in range(1, count + 1)
        for some in combinations(range(count), size)
        if size == 1 or count <= MOST
    ]
    found = np.concatenate([np.array(even, float), grid(count, config.parts, config.beyond)])
    _, first = np.unique(found.round(9), axis=0, return_index=True)
    return found[np.sort(first)]


def learned_soups(config: SoupConfig, name: str, seed: int, store: Store) -> dict[str, Weights]:
    """Soups of one of the config's sets by how they were learned; kept in the store, so that a second start finds the same.

    Raises:
        UserError: the set has too few images.
    """
    path = f"learned/{name}.json"
    if config.learn.how and not store.exists(path):
        uri, corruption = config.sets[name]
        dataset = _labelled(uri)
        last, shots = dataset.header.num_samples, config.learn.shots
        if config.examples + shots > last:
            raise UserError(
                f"{dataset.uri} has {last} images: too few for soup.learn.shots={shots} beside the "
                f"soup.examples={config.examples} that are judged."
            )
        ids = np.random.default_rng(seed).choice(np.arange(config.examples, last), shots, replace=False)
        said = [corruption, config.severity] if corruption else []
        images, label = _images(Reader(dataset, ["image", "label"]), np.sort(ids), said, seed)
        network, states = members_of(config, dataset.header)
        told = (network, list(states.values()), images.float(), label)
        found = {how.value: learned(*told, how, config.learn.steps) for how in config.learn.how}
        store.put_once(path, to_json(found))
    return from_json(store.read(path)) if config.learn.how else {}  # type: ignore[no-any-return]


def learned_soup(place: str, images: Header) -> nn.Module:
    """The network of one of them, for such images.

    Args:
        place: <soup.out>/<set>:<how>.

    Raises:
        UserError: it is not there.
    """
    uri, _, how = place.rpartition(":")
    said = Dataset.open(uri).header.provenance if uri else {}
    if how not in said.get("learned", {}):
        known = ", ".join(said.get("learned", {})) or "none"
        raise UserError(f"start.learned='{place}' is <soup.out>/<set>:<how> of a soup; learned there: {known}.")
    network, states = members_of(configuration.from_dict(SoupConfig, {**said["soup"], "out": uri}), images)
    network.load_state_dict(soup(list(states.values()), said["learned"][how]))
    return network


def _labelled(uri: str) -> Dataset:
    dataset = Dataset.open(uri)
    if "label" not in dataset.header.fields or dataset.without_label:
        raise UserError(f"{dataset.uri} has images without a label, which soups cannot be judged by; leave them out.")
    return dataset


def _images(reader: Reader, ids: np.ndarray, corruption: list[Any], seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 of these numbers, if they are to be with a [corruption, severity], and labels."""
    batch = reader.gather(ids)
    images, label = (torch.from_numpy(batch[name]) for name in ("image", "label"))
    if corruption:
        name, severity = corruption
        row = torch.from_numpy(np.stack([ids, np.zeros_like(ids), np.full_like(ids, 81)], 1))
        images = corrupted(images, row, name, severity, seed)
    return images, label


def header_of(config: SoupConfig, name: str, seed: int, learned: dict[str, Weights] | None = None) -> Header:
    """Of what is found on one of the config's sets.

    Args:
        learned: of `learned_soups`.

    Raises:
        UserError: there are no such images or classifiers.
    """
    uri, corruption = config.sets[name]
    images = _labelled(uri).header
    _, states = members_of(config, images)
    weights = candidates(config, len(states))
    threats = [CLEAN, *(config.threats if name == "test" else ())]
    done = {run: commits(Store(run))[-1].step for run in config.members.values()}
    apart = (
        "shifts",
        "corruptions",
        "severity",
        "out",
        "shots",
        "learn",
    )  # which the results of other sets do not depend on
    fields = {"label": Field("int")}
    for threat in threats:
        fields |= {threat: Field("str"), f"{ENSEMBLE}_{threat}": Field("int")}
    count = min(config.examples, images.num_samples)
    provenance = {
        "soup": {k: v for k, v in configuration.to_dict(config).items() if k not in apart},
        "images": Store(uri).uri,
        "corruption": [corruption, config.severity] if corruption else [],
        "seed": seed,
        "commits": done,
        "threats": threats,
        "members": list(states),
        "weights": weights.tolist(),
        **({"learned": learned} if learned else {}),
    }
    title = f"soups on {corruption and corruption + ' of '}{images.name}"
    return Header(title, fields, count, config.shard_size, images.classes, provenance=provenance)


class Judge:
    """Judges all candidates on the images of one shard. Config key: "out"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.dataset, self.device = Dataset.open(config["out"]), device
        torch.backends.cudnn.allow_tf32 = False  # attacks are in fp32, the convolutions of a GPU too
        said = self.dataset.header.provenance
        self.config = configuration.from_dict(SoupConfig, {**said["soup"], "out": config["out"]})
        images = Dataset.open(said["images"])
        network, states = members_of(self.config, images.header)
        weights, self.seed = [*said["weights"], *said.get("learned", {}).values()], int(said["seed"])
        there = [_on(state, device) for state in states.values()]
        self.stack, self.count = Stack(network.to(device), there, weights), len(weights)
        self.members = Stack(network, there, np.eye(len(there)).tolist())
        self.threats = [name for name in said["threats"] if name != CLEAN]
        self.corruption = said["corruption"]
        self.reader = Reader(images, ["image", "label"])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.dataset.header.shard_range(shard))
        images, labels = _images(self.reader, ids, self.corruption, self.seed)
        x = images.to(self.device).float() / 255
        label, number = labels.to(self.device), torch.from_numpy(ids).to(self.device)
        logits, together = self.stack(255 * x), self._together(255 * x)
        right = {CLEAN: logits.argmax(2) == label}
        ensemble = {CLEAN: together.argmax(1) == label}
        for name in self.threats:
            held, threat = (
                self._all_held if self.stack.at_once > 1 else self._each_held,
                self.config.threats[name].threat,
            )
            right[name] = held(threat, x, label, number, logits)
            ensemble[name] = self._held(threat, self._together, x, label, number, together)
        found: list[dict[str, Any]] = [{"key": f"{i:08d}", "label": int(y)} for i, y in zip(ids, labels, strict=True)]
        for name in right:
            for sample, bits, one in zip(found, right[name].T.tolist(), ensemble[name].tolist(), strict=True):
                sample |= {name: "".join("01"[bit] for bit in bits), f"{ENSEMBLE}_{name}": int(one)}
        return found

    def _together(self, images: Tensor) -> Tensor:
        """Logits [B, K] of the members' mean probabilities."""
        return self.members(images).log_softmax(2).logsumexp(0)

    def _all_held(self, threat: Threat, x: Tensor, label: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """bool [candidates, B]: right, also under attack, as of `_held`; in one batch as many candidates as go in a pass."""
        found, batch = list[Tensor](), (x, label, ids)
        for part, own in zip(self.stack.parts(), logits.split(self.stack.at_once), strict=True):
            x, label, ids = (t.repeat(part.count, *[1] * (t.dim() - 1)) for t in batch)
            found.append(
                self._held(threat, part.flat, x, label, ids, own.flatten(0, 1), go_on=True).view(part.count, -1)
            )
        return torch.cat(found)

    def _each_held(self, threat: Threat, x: Tensor, label: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """The same of one candidate after the other: what is broken goes no further."""
        models = [partial(self.stack.alone, k) for k in range(self.count)]
        return torch.stack([self._held(threat, m, x, label, ids, own) for m, own in zip(models, logits, strict=True)])

    def _held(
        self, threat: Threat, model: Model, x: Tensor, label: Tensor, ids: Tensor, logits: Tensor, go_on: bool = False
    ) -> Tensor:
        """bool [B]: right without an attack, after an ascent of the cross-entropy, and after one towards the likeliest other
        class.

        Args:
            model: of images in [0, 255].
            go_on: with what is wrong, so that the batch stays as it is.
        """
        row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 80)], 1)
        target = logits.scatter(1, label[:, None], -torch.inf).argmax(1)
        held, oracle = logits.argmax(1) == label, Oracle(lambda z: model(255 * z))
        for loss in (cross_entropy, targeted(logits.shape[1])):
            some = torch.arange(len(x), device=x.device) if go_on else torch.nonzero(held)[:, 0]
            if not len(some):
                break
            found = apgd(oracle, x[some], label[some], row[some], threat, loss, self.config.steps, self.seed,
                         target=target[some], go_on=go_on)  # fmt: skip
            held[some] &= ~found.broken
        return held


def _on(state: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in state.items()}


def matrix(dataset: Dataset) -> dict[str, np.ndarray]:
    """CLEAN or a threat -> bool [candidates, images], of what was not learned."""
    count = len(dataset.header.provenance["weights"])
    return {name: right[:count] for name, right in _digits(dataset).items()}


def of_learned(dataset: Dataset) -> dict[str, dict[str, np.ndarray]]:
    """How a soup was learned -> the same of it: bool [images]."""
    said = dataset.header.provenance
    if not said.get("learned"):
        return {}
    right, count = _digits(dataset), len(said["weights"])
    return {how: {name: r[count + k] for name, r in right.items()} for k, how in enumerate(said["learned"])}


def _digits(dataset: Dataset) -> dict[str, np.ndarray]:
    header = dataset.header
    threats = header.provenance["threats"]
    columns = Reader(dataset, threats).gather(np.arange(header.num_samples))
    return {name: np.array([[c == "1" for c in text] for text in columns[name]]).T for name in threats}


def ensemble(dataset: Dataset) -> dict[str, np.ndarray]:
    """The same of the members' ensemble: bool [images]."""
    header = dataset.header
    names = {name: f"{ENSEMBLE}_{name}" for name in header.provenance["threats"]}
    columns = Reader(dataset, list(names.values())).gather(np.arange(header.num_samples))
    return {name: columns[column].astype(bool) for name, column in names.items()}


def summary(config: SoupConfig, test: Dataset, shifts: dict[str, Dataset], seed: int) -> dict[str, Any]:
    """The table of all candidates and what follows from it.

    Returns:
        "members"; "soups": of each candidate its weights and, by CLEAN, threat and "union", its accuracy; "best": by these
        the number of the best in that list; "greedy": that of the greedy soup for the union; "learned": by how, the same of
        soups whose weights were learned; "ensemble": the accuracies of the members' mean probabilities; "beats_specialist"
        and "barriers", see below; "few_shot": by shift what choosing by few images comes to, beside the best member and
        soup, and what was learned on some.
    """
    right, weights = matrix(test), np.array(test.header.provenance["weights"])
    names = list(test.header.provenance["members"])
    together, taught = ensemble(test), of_learned(test)
    for some in (right, together, *taught.values()):
        some["union"] = np.logical_and.reduce(list(some.values()))
    accuracy = {name: found.mean(1) for name, found in right.items()}
    alone = [_number(weights, row) for row in np.eye(len(names))]
    found: dict[str, Any] = {
        "members": names,
        "soups": [{"weights": w.tolist(), **{n: share(r[k]) for n, r in right.items()}} for k, w in enumerate(weights)],
        "best": {name: int(values.argmax()) for name, values in accuracy.items()},
        "beats_specialist": {name: _compared(r, weights, alone, names) for name, r in right.items()},
        "barriers": _barriers(1 - accuracy[CLEAN], weights, names),
        "few_shot": {name: _few_shot(config.shots, dataset, alone, seed) for name, dataset in shifts.items()},
    }
    if taught:
        own = test.header.provenance["learned"]
        found["learned"] = {
            how: {"weights": own[how], **{n: share(r) for n, r in some.items()}} for how, some in taught.items()
        }
    if len(names) > 1:
        found["ensemble"] = {name: share(r) for name, r in together.items()}
    if len(names) <= MOST:
        union = accuracy["union"]
        found["greedy"] = _number(weights, greedy(union[alone].tolist(), lambda w: float(union[_number(weights, w)])))
    return found


def _number(weights: np.ndarray, row: Any) -> int:
    """Of the candidate with these weights."""
    return int(np.abs(weights - np.asarray(row)).sum(1).argmin())


def _compared(right: np.ndarray, weights: np.ndarray, alone: list[int], names: list[str]) -> dict[str, Any]:
    """The best member and the best mixture, chosen by every other image and judged by the rest: their accuracies, how many
    images each alone gets right, and the two-sided p-value of that (McNemar 1947, exact)."""
    mixed = np.setdiff1d(np.arange(len(weights)), alone)
    if not len(mixed):
        return {}
    chosen, judged = right[:, ::2].mean(1), right[:, 1::2]
    one, soup = alone[int(chosen[alone].argmax())], int(mixed[chosen[mixed].argmax()])
    a, b = int((judged[one] & ~judged[soup]).sum()), int((judged[soup] & ~judged[one]).sum())
    return {
        "member": names[alone.index(one)],
        "alone": float(judged[one].mean()),
        "soup": float(judged[soup].mean()),
        "weights": weights[soup].tolist(),
        "only_alone": a,
        "only_soup": b,
        "p": sign_test(b, a),
    }


def _barriers(error: np.ndarray, weights: np.ndarray, names: list[str]) -> dict[str, float]:
    """Between every two members, of the error along the line from one to the other."""
    found = {}
    for i, j in combinations(range(len(names)), 2):
        between = (weights >= 0).all(1) & np.isclose(weights[:, [i, j]].sum(1), 1)
        line = sorted(np.flatnonzero(between), key=lambda k: weights[k, j])
        places = [float(weights[k, j]) for k in line]
        found[f"{names[i]} - {names[j]}"] = barrier(np.interp(np.linspace(0, 1, 11), places, error[line]).tolist())
    return found


def _few_shot(shots: list[int], dataset: Dataset, alone: list[int], seed: int) -> dict[str, Any]:
    right, rng = matrix(dataset)[CLEAN], np.random.default_rng(seed)
    reached = {}
    for some in (s for s in shots if s < right.shape[1]):
        _, values = few_shot(right, some, 50, rng)
        reached[str(some)] = {"mean": float(values.mean()), "std": float(values.std())}
    means = right.mean(1)
    together = float(ensemble(dataset)[CLEAN].mean())
    return {
        "chosen": reached,
        "best_member": float(means[alone].max()),
        "best_soup": float(means.max()),
        ENSEMBLE: together,
        "learned": {how: float(some[CLEAN].mean()) for how, some in of_learned(dataset).items()},
    }
