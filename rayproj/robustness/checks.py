"""What is measured beside the attacks, each measure once, whoever takes it: signs of masked gradients, whether what breaks
one classifier breaks another, what a defence costs and what its checklist asks of a few images.

What is written is a dataset of a run's own with one measure a shard, so that a killed run keeps those that are done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.robustness import adaptive
from rayproj.robustness.adaptive import Cost, Probe
from rayproj.robustness.autoattack import CLEAN
from rayproj.robustness.defences import Defence
from rayproj.robustness.job import RobustnessConfig, builder, share
from rayproj.robustness.masking import signs
from rayproj.robustness.oracle import Model, OfUnit

CHECKED = 64  # images of each check but the transfer, which is of all


class Task(Enum):
    masking = "masking"  # of a classifier, under a threat
    transfer = "transfer"  # of a classifier's attacked images, in a shard
    probe = "probe"  # of a defence, under a threat
    cost = "cost"  # of a defence


@dataclass
class Checks:
    """What was found.

    Attributes:
        masking: by classifier, the signs under each "threat".
        transfer: by threat, by the classifier that an image was made against, by another one: the accuracy of that on the
            images that an attack broke and that it has right without one, if there are any.
        costs: by defence.
        probes: by defence, by threat.
    """

    masking: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    transfer: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    probes: dict[str, dict[str, Probe]] = field(default_factory=dict)


def header_of(config: RobustnessConfig, attacked: Mapping[str, Dataset], seed: int) -> Header:
    """Of the dataset of the checks, which says what each shard is to measure.

    Args:
        attacked: name of a classifier or defence -> its attacked images, all there.
    """
    tasks: list[list[str | int]] = []
    for name, dataset in attacked.items():
        first = Task.probe if name in config.defences else Task.masking
        tasks += [[first.value, name, threat] for threat in config.balls]
        if name in config.defences:
            tasks.append([Task.cost.value, name, ""])
        elif len(config.classifiers) > 1:
            tasks += [[Task.transfer.value, name, shard] for shard in range(dataset.header.num_shards)]
    provenance = {
        "robustness": configuration.to_dict(config),
        "seed": seed,
        "attacked": {name: [dataset.uri, dataset.manifest_hash()] for name, dataset in attacked.items()},
        "tasks": tasks,
    }
    return Header("checks of robustness", {"found": Field("str")}, len(tasks), 1, (), provenance=provenance)


class Checker:
    """Takes one measure, a function of the header and the shard's number but for times. Config key: "out"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.dataset, self.device = Dataset.open(config["out"]), device
        said = self.dataset.header.provenance
        self.config, self.seed = configuration.from_dict(RobustnessConfig, said["robustness"]), int(said["seed"])
        self.attacked = {name: Dataset.open(uri) for name, (uri, _) in said["attacked"].items()}
        self.network, self.defence = lru_cache(maxsize=8)(self._network), lru_cache(maxsize=2)(self._defence)
        torch.backends.cudnn.allow_tf32 = False

    def make(self, shard: int) -> list[dict[str, Any]]:
        kind, name, which = self.dataset.header.provenance["tasks"][shard]
        found = getattr(self, f"_{kind}")(name, which)
        return [{"key": f"{shard:06d}", "found": json.dumps(found)}]

    def _network(self, name: str) -> nn.Module:
        return OfUnit(classifiers.load(self.config.classifiers[name], self.device))

    def _defence(self, name: str) -> tuple[Model, Callable[[Model], Defence]]:
        """Its base, and what builds it around one."""
        defence = self.config.defences[name]
        base = self.network(defence.base)
        return base, builder(defence, self.config, base, self.device, self.seed)

    def _masking(self, name: str, threat: str) -> list[dict[str, Any]]:
        x, label = self._first(Dataset.open(self.config.test), "image")
        ids, ball = torch.arange(len(x), device=self.device), self.config.balls[threat]
        found = signs(self.network(name), x / 255, label, ids, ball, seed=self.seed)
        return [{"threat": threat, **asdict(sign)} for sign in found]

    def _transfer(self, made: str, shard: int) -> dict[str, dict[str, list[bool]]]:
        """By threat, by the other classifier: which of the images that count it has right."""
        dataset, threats = self.attacked[made], list(self.config.balls)
        fields = ["label", *(f"{t}_{what}" for t in threats for what in ("by", "image"))]
        batch = Reader(dataset, fields).gather(np.array(dataset.header.shard_range(shard)))
        found: dict[str, dict[str, list[bool]]] = {threat: {} for threat in threats}
        for name in self.config.classifiers:
            if name == made:
                continue
            alone = Reader(self.attacked[name], ["prediction"]).gather(batch["index"])["prediction"] == batch["label"]
            for threat in threats:
                some = alone & ~np.isin(batch[f"{threat}_by"].astype(str), ["", CLEAN])
                if some.any():
                    with torch.no_grad():
                        after = self.network(name)(torch.from_numpy(batch[f"{threat}_image"][some]).to(self.device))
                    found[threat][name] = (after.argmax(1).cpu().numpy() == batch["label"][some]).tolist()
        return found

    def _probe(self, name: str, threat: str) -> dict[str, Any]:
        base, build = self.defence(name)
        attacked, label = self._first(self.attacked[name], f"{threat}_image")
        x, _ = self._first(Dataset.open(self.config.test), "image")
        ids, ball = torch.arange(len(label), device=self.device), self.config.balls[threat]
        tried = (ids, ball, self.config.adaptive, self.seed)
        return asdict(adaptive.probe(build(base), x[: len(label)] / 255, attacked, label, *tried))

    def _cost(self, name: str, _: str) -> dict[str, Any]:
        base, build = self.defence(name)
        x, _label = self._first(Dataset.open(self.config.test), "image")
        times = adaptive.seconds((base, build(base)), x / 255)
        return asdict(Cost(adaptive.passes(build, base, x / 255), (times[0], times[1])))

    def _first(self, dataset: Dataset, images: str) -> tuple[Tensor, Tensor]:
        """fp32 [CHECKED, C, H, W] and labels."""
        batch = Reader(dataset, [images, "label"]).gather(np.arange(min(CHECKED, dataset.header.num_samples)))
        values, label = (torch.from_numpy(batch[name]).to(self.device) for name in (images, "label"))
        return values.float(), label


def gathered(dataset: Dataset) -> Checks:
    """What all measures together say."""
    texts = Reader(dataset, ["found"]).gather(np.arange(dataset.header.num_samples))["found"]
    found, held = Checks(), dict[tuple[str, str, str], list[bool]]()
    for (kind, name, which), text in zip(dataset.header.provenance["tasks"], texts, strict=True):
        one = json.loads(str(text))
        if kind == Task.masking.value:
            found.masking.setdefault(name, []).extend(one)
        elif kind == Task.transfer.value:
            for threat, others in one.items():
                found.transfer.setdefault(threat, {}).setdefault(name, {})
                for other, right in others.items():
                    held.setdefault((threat, name, other), []).extend(right)
        elif kind == Task.probe.value:
            found.probes.setdefault(name, {})[which] = Probe(**one)
        else:
            passes = one["passes"] and (one["passes"][0], one["passes"][1])
            found.costs[name] = Cost(passes, (one["seconds"][0], one["seconds"][1]))
    for (threat, made, other), right in held.items():
        found.transfer[threat][made][other] = share(np.array(right))
    return found
