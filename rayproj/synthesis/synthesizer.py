"""Draws the shards of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.errors import UserError
from rayproj.synthesis.plan import commit_hash, label_of


class Synthesizer:
    """Makes one shard at a time, a function of the plan and the shard's number. Config keys: "out", "batch"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device, self.batch = device, int(config["batch"])
        self.header = Dataset.open(config["out"]).header
        provenance = self.header.provenance
        self.model = TrainedModel(provenance["model"], device)
        if commit_hash(self.model.commit) != provenance["model_commit"]:
            raise UserError(
                f"The model {provenance['model']} has a newer commit (step {self.model.commit.step}) than the one that "
                f"{config['out']} was planned with (step {provenance['model_step']}); give generate.out another place."
            )
        self.sampler = configuration.from_dict(SamplerConfig, provenance["sampler"])
        self.seed = int(provenance["seed"])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        labels = np.array([label_of(int(i), len(self.header.classes)) for i in ids])
        images = []
        for begin in range(0, len(ids), self.batch):
            part = slice(begin, begin + self.batch)
            label, index = (torch.from_numpy(a[part]).to(self.device) for a in (labels, ids))
            images.append(self.model.draw(label, index, self.seed, self.sampler).cpu().numpy())
        drawn = np.concatenate(images)
        return [
            {"key": f"{i:08d}", "image": drawn[k], "label": int(labels[k]), "seed": self.seed}
            for k, i in enumerate(ids)
        ]
