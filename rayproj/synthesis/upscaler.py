"""Larger images of a dataset, by a diffusion model that was trained to make them of smaller ones (Saharia et al. 2021,
"Image Super-Resolution via Iterative Refinement"; with noise augmentation, Ho et al. 2022, "Cascaded Diffusion Models").
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj import keyed
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.diffusion.conditions import LOW, LOW_NOISE, TEXT, Condition, Conditions, noisy
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig, TrainedModel
from rayproj.engine.checkpoint import commits
from rayproj.errors import UserError
from rayproj.evaluation.watermark import WatermarkConfig
from rayproj.privacy.certificate import certificate
from rayproj.responsibility import safety
from rayproj.responsibility.provenance import ProvenanceConfig
from rayproj.responsibility.safety import TRIES, SafetyConfig
from rayproj.storage.store import Store, from_json
from rayproj.synthesis import gate
from rayproj.synthesis.gate import Gate
from rayproj.synthesis.plan import PROMPT, commit_hash


@dataclass
class UpscaleConfig:
    """Which images, by which model, to where."""

    model: str = "???"  # run dir of jobs/train_diffusion.py, with the condition "low"
    images: str = "???"  # a dataset of images of the side that the model's "low" had
    out: str = "???"
    noise: float = 0.0  # level of the noise that they are given first; up to what the model was trained with
    batch: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)  # that of the small images is lost
    safety: SafetyConfig = field(default_factory=SafetyConfig)  # no rules: those that the small images had to pass
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)  # who signs for the dataset

    def problems(self) -> list[str]:
        found = [] if 0 <= self.noise < 1 else [f"upscale.noise must lie in [0, 1), not {self.noise:g}."]
        return found if self.batch > 0 else [*found, "upscale.batch must be positive."]


def plan(config: UpscaleConfig, seed: int) -> Header:
    """The header of the dataset to be written: as that of the images, with larger ones.

    Raises:
        UserError: there is no such model or dataset, or they do not go together; or the mark of the images would be lost.
    """
    run = Store(config.model)
    if not run.exists("config.yaml") or not (done := commits(run)):
        raise UserError(f"There is no trained model at '{config.model}'; give the run dir of a diffusion model.")
    diffusion = configuration.section(DiffusionConfig, run.read("config.yaml"), "diffusion")
    latents = Dataset.open(diffusion.latents).header
    low = Conditions.of(diffusion.conditioned, latents).low
    images = Dataset.open(config.images).header
    if images.fields["image"].shape != low:
        raise UserError(
            f"The images of '{config.images}' have the shape {images.fields['image'].shape}, and the model of "
            f"'{config.model}' makes larger ones of {low or 'none: it has no condition low'}."
        )
    if config.noise > diffusion.conditioned[LOW].noise:
        raise UserError(
            f"upscale.noise={config.noise:g} is more than the model was trained with ({diffusion.conditioned[LOW].noise:g})."
        )
    inherited = {name: said for name, said in images.provenance.items() if name not in ("watermark", "safety")}
    if "watermark" in images.provenance and not config.watermark.key:
        raise UserError(
            f"The images of '{config.images}' carry a watermark, which an image drawn anew has not; give "
            "upscale.watermark.key, a file with a secret."
        )
    rules = config.safety
    if not rules.rules and "safety" in images.provenance:
        rules = safety.planned(images.provenance["safety"])
    tries = {TRIES: Field("int")} if rules.rules else {}
    shape = tuple(from_json(Store(latents.provenance["autoencoder"]).read("result.json"))["image_shape"])
    own, source = certificate(run), images.provenance.get("private")
    return replace(
        images,
        name=f"{images.name}, {shape[1]}x{shape[2]}",
        fields={n: f for n, f in images.fields.items() if n != TRIES} | {"image": Field("png", shape), **tries},
        provenance={
            **inherited,
            **gate.described(config.watermark, rules),
            "upscaled_from": Store(config.images).uri,
            "upscaler": run.uri,
            "upscaler_commit": commit_hash(done[-1]),
            "upscaler_sampler": configuration.to_dict(config.sampler),
            "upscaler_noise": config.noise,
            "upscaler_seed": seed,
            "private": own or source,
            **({"private_source": source} if own and source else {}),
        },
    )


class Upscaler:
    """Makes a shard of larger images from the same shard of small ones. Config keys: "out", "batch", and "key", the file
    with the watermark's secret, where there is one."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device, self.batch = device, int(config["batch"])
        dataset = Dataset.open(config["out"])
        self.header, self.gate = dataset.header, Gate(dataset, config.get("key", ""), device, "upscale")
        said = self.header.provenance
        self.reader = Reader(Dataset.open(said["upscaled_from"]))
        self.model = TrainedModel(said["upscaler"], device)
        if commit_hash(self.model.commit) != said["upscaler_commit"]:
            raise UserError(
                f"The model {said['upscaler']} has a newer commit than '{config['out']}' was planned with; give another."
            )
        self.sampler = configuration.from_dict(SamplerConfig, said["upscaler_sampler"])
        self.model.prepare(self.sampler)
        self.noise, self.seed = float(said["upscaler_noise"]), int(said["upscaler_seed"])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        columns = self.reader.gather(ids)
        parts = [slice(i, i + self.batch) for i in range(0, len(ids), self.batch)]
        drawn = np.concatenate([self._draw(ids[p], {n: c[p] for n, c in columns.items()}) for p in parts])
        kept = {name: columns[name].tolist() for name in self.header.fields if name not in ("image", TRIES)}
        samples = [
            {
                "key": f"{i:08d}",
                "image": drawn[k],
                **{n: values[k] for n, values in kept.items()},
                **self.gate.fields(i),
            }
            for k, i in enumerate(map(int, ids))
        ]
        self.gate.record(shard, map(int, ids))
        self.gate.forget(but=lambda i: False)
        return samples

    def _draw(self, ids: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
        """uint8 images [n, C, H, W] of these samples, which may be shown, and marked."""
        return self.gate.through(ids, lambda at, keys: self._sample(keys, {n: c[at] for n, c in columns.items()}))

    def _sample(self, keys: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Larger ones of these images, from the noise of these keys."""
        index, count = torch.from_numpy(keys).to(self.device), len(keys)
        row = torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=1)
        small = torch.from_numpy(columns["image"]).to(self.device)
        level = torch.full((count,), self.noise, device=self.device)
        condition: Condition = self.model.conditions.nothing(count, self.device)
        condition[LOW] = noisy(small, level, keyed.normal(self.seed, "low_noise", row, tuple(small.shape[1:])))
        condition[LOW_NOISE] = level
        for name in self.model.conditions.values:  # what else the model knows, where the images have it
            if name in columns and self._same(name):
                condition[name] = torch.from_numpy(columns[name]).to(self.device)
        if TEXT in condition and PROMPT in columns:
            condition[TEXT] = self.model.text(list(columns[PROMPT]))
        return self.model.draw(condition, index, self.seed, self.sampler).cpu().numpy()

    def _same(self, name: str) -> bool:
        """Whether the numbers of a class or property stand for the same."""
        return self.header.values_of(name) == self.model.header.values_of(name)
