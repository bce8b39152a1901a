"""Draws the shards of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Header
from rayproj.diffusion.conditions import TEXT, Condition
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.errors import UserError
from rayproj.synthesis.gate import Gate
from rayproj.synthesis.plan import LABEL, PROMPT, Cells, commit_hash, stated


def planned_model(header: Header, device: str) -> TrainedModel:
    """The model of a plan, ready to draw what the plan says.

    Raises:
        UserError: it, or what guides it, is gone or has a newer commit than the plan's.
    """
    provenance = header.provenance
    model = TrainedModel(provenance["model"], device, provenance["ema"])
    models = {"model": model}
    if "weak" in provenance:
        models["weak"] = TrainedModel(provenance["weak"], device)
        model.guide_by(models["weak"])
    for name, one in models.items():
        if commit_hash(one.commit) != provenance[f"{name}_commit"]:
            raise UserError(
                f"The model {provenance[name]} has a newer commit (step {one.commit.step}) than the one that was planned "
                "with; give generate.out another place."
            )
    model.prepare(configuration.from_dict(SamplerConfig, provenance["sampler"]))
    model.draws(header.fields["image"].shape)
    return model


class Synthesizer:
    """Makes one shard at a time, a function of the plan, the batch and the shard's number. Config keys: "out", "batch",
    and "key", the file with the watermark's secret, where there is one.

    Batches are runs of samples of the whole dataset, so that they are full whatever the shards, and an image has the same
    mates whoever draws it: made again, it is the same to the last bit. What a batch holds of the next shard is kept.
    """

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device, self.batch = device, int(config["batch"])
        self.dataset = Dataset.open(config["out"])
        self.header = self.dataset.header
        provenance = self.header.provenance
        self.model = planned_model(self.header, device)
        self.sampler = configuration.from_dict(SamplerConfig, provenance["sampler"])
        self.seed, self.axes = int(provenance["seed"]), dict(provenance["axes"])
        self.cells = Cells(self.axes, provenance.get("shares", []), self.header.num_samples)
        self.said = {"plan": provenance["plan"][:16], "model_commit": provenance["model_commit"][:16]}
        self.said["certificate"] = stated(provenance["private"])
        # Of a property the number that the model has for it, which is not its place in the plan.
        self.numbers = {
            name: list(range(len(values))) if name == LABEL else [self.header.values_of(name).index(v) for v in values]
            for name, values in self.axes.items()
            if name != PROMPT
        }
        self.gate = Gate(self.dataset, config.get("key", ""), device, "generate")
        self.drawn: dict[int, np.ndarray | None] = {}  # by batch: those that the last shard took from
        self.prompts = self.model.text(self.axes[PROMPT]) if PROMPT in self.axes else None

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        batches = range(int(ids[0]) // self.batch, int(ids[-1]) // self.batch + 1)
        self.drawn = {number: self.drawn.get(number) for number in batches}
        self.gate.forget(but=lambda i: i // self.batch in batches)
        for number in batches:
            if self.drawn[number] is None:
                of = np.arange(number * self.batch, min((number + 1) * self.batch, self.header.num_samples))
                self.drawn[number] = self._draw(of)
        found = []
        for i in map(int, ids):
            number, place = divmod(i, self.batch)
            image = self.drawn[number][place]  # type: ignore[index]
            found.append({"key": f"{i:08d}", "image": image, "seed": self.seed, **self._fields(i)})
        self.gate.record(shard, map(int, ids))
        return found

    def _draw(self, ids: np.ndarray) -> np.ndarray:
        """uint8 images [n, C, H, W] of these samples, which may be shown, and marked."""
        return self.gate.through(ids, lambda at, keys: self._sample(ids[at], keys), self._shows)

    def _shows(self, sample: int) -> Any:
        return {n: self.axes[n][number] for n, number in self.cells.of(sample).items()} or "no condition"

    def _sample(self, ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """What these samples show, from the noise of these keys."""
        cells = [self.cells.of(int(i)) for i in ids]
        condition: Condition = self.model.conditions.nothing(len(ids), self.device)
        for name, numbers in self.numbers.items():
            condition[name] = torch.tensor([numbers[cell[name]] for cell in cells], device=self.device)
        if self.prompts is not None:
            condition[TEXT] = self.prompts[[cell[PROMPT] for cell in cells]]
        index = torch.from_numpy(keys).to(self.device)
        scales = None
        if not np.isnan(self.cells.guidance).all():
            scales = torch.tensor([self._guidance(int(i)) for i in ids], dtype=torch.float32, device=self.device)
        return self.model.draw(condition, index, self.seed, self.sampler, scales).cpu().numpy()

    def _guidance(self, sample: int) -> float:
        own = self.cells.guidance[self.cells.number(sample)]
        return self.sampler.guidance if np.isnan(own) else float(own)

    def _fields(self, sample: int) -> dict[str, Any]:
        """What the sample's JSON says of it: enough to make it again, and to know what it may be used for."""
        cell, weights = self.cells.of(sample), self.sampler.weights
        found: dict[str, Any] = {name: numbers[cell[name]] for name, numbers in self.numbers.items()}
        found |= self.said
        found |= self.gate.fields(sample)
        found["guidance"] = " ".join(f"{n}={w:g}" for n, w in weights.items()) or f"{self._guidance(sample):g}"
        return {**found, PROMPT: self.axes[PROMPT][cell[PROMPT]]} if PROMPT in self.axes else found
