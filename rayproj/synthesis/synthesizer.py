"""Draws the shards of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.diffusion.conditions import TEXT, Condition
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.errors import UserError
from rayproj.synthesis.plan import LABEL, PROMPT, cell_of, commit_hash


class Synthesizer:
    """Makes one shard at a time, a function of the plan and the shard's number. Config keys: "out", "batch"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device, self.batch = device, int(config["batch"])
        self.header = Dataset.open(config["out"]).header
        provenance = self.header.provenance
        self.model = TrainedModel(provenance["model"], device, provenance["ema"])
        models = {"model": self.model}
        if "weak" in provenance:
            models["weak"] = TrainedModel(provenance["weak"], device)
            self.model.guide_by(models["weak"])
        for name, model in models.items():
            if commit_hash(model.commit) != provenance[f"{name}_commit"]:
                raise UserError(
                    f"The model {provenance[name]} has a newer commit (step {model.commit.step}) than the one that "
                    f"{config['out']} was planned with; give generate.out another place."
                )
        self.sampler = configuration.from_dict(SamplerConfig, provenance["sampler"])
        self.model.prepare(self.sampler)
        self.model.draws(self.header.fields["image"].shape)
        self.seed, self.axes = int(provenance["seed"]), dict(provenance["axes"])
        # Of a property the number that the model has for it, which is not its place in the plan.
        self.numbers = {
            name: list(range(len(values))) if name == LABEL else [self.header.values_of(name).index(v) for v in values]
            for name, values in self.axes.items()
            if name != PROMPT
        }
        self.prompts = self.model.text(self.axes[PROMPT]) if PROMPT in self.axes else None

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        cells = [cell_of(int(i), self.axes) for i in ids]
        drawn = np.concatenate(
            [self._draw(ids[i : i + self.batch], cells[i : i + self.batch]) for i in range(0, len(ids), self.batch)]
        )
        return [
            {"key": f"{i:08d}", "image": drawn[k], "seed": self.seed, **self._fields(cells[k])}
            for k, i in enumerate(ids)
        ]

    def _draw(self, ids: np.ndarray, cells: list[dict[str, int]]) -> np.ndarray:
        condition: Condition = self.model.conditions.nothing(len(ids), self.device)
        for name, numbers in self.numbers.items():
            condition[name] = torch.tensor([numbers[cell[name]] for cell in cells], device=self.device)
        if self.prompts is not None:
            condition[TEXT] = self.prompts[[cell[PROMPT] for cell in cells]]
        images = self.model.draw(condition, torch.from_numpy(ids).to(self.device), self.seed, self.sampler)
        return images.cpu().numpy()

    def _fields(self, cell: dict[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = {name: numbers[cell[name]] for name, numbers in self.numbers.items()}
        return {**found, PROMPT: self.axes[PROMPT][cell[PROMPT]]} if PROMPT in self.axes else found
