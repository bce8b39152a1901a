"""What is to be generated, as a pure function of the config and the model: sample i has label, seed and shard by its id.

The plan is the header of the dataset to be written, so it is stored once, before the first sample; another plan for
the same place is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.engine.checkpoint import Commit, commits
from rayproj.errors import UserError
from rayproj.privacy.certificate import certificate
from rayproj.storage.store import Store, from_json, to_json


@dataclass
class GenerateConfig:
    """A class-balanced synthetic dataset from one trained model."""

    model: str = "???"  # run dir of jobs/train_diffusion.py or jobs/finetune_private.py
    out: str = "???"  # the dataset to write
    samples: int = 10000
    shard_size: int = 128
    batch: int = 128  # images drawn at once by a sampler
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def problems(self) -> list[str]:
        return [f"generate.{k} must be positive." for k in ("samples", "shard_size", "batch") if getattr(self, k) <= 0]


def label_of(sample: int, num_classes: int) -> int:
    """Classes take turns, so that every run of samples is as balanced as its length allows."""
    return sample % num_classes


def plan(config: GenerateConfig, seed: int) -> Header:
    """The header of the dataset to be written.

    Raises:
        UserError: the model's run is not there or has no commit.
    """
    run = Store(config.model)
    if not run.exists("config.yaml"):
        raise UserError(f"There is no run at '{config.model}'; give the run dir of a trained diffusion model.")
    latents = Dataset.open(configuration.value(run.read("config.yaml"), "diffusion")["latents"]).header
    autoencoder = Store(latents.provenance["autoencoder"])
    shape = tuple(from_json(autoencoder.read("result.json"))["image_shape"])
    newest = _newest(run)
    private = certificate(run)
    provenance: dict[str, Any] = {
        "model": run.uri,
        "model_commit": commit_hash(newest),
        "model_step": newest.step,
        "autoencoder_commit": commit_hash(_newest(autoencoder)),
        "sampler": configuration.to_dict(config.sampler),
        "seed": seed,
        # Read after the commit, so that the ledger has every release that is in it.
        "private": private and {**private, "model_commit": commit_hash(newest)},
    }
    fields = {"image": Field("png", shape), "label": Field("int"), "seed": Field("int")}
    layout = {"samples": config.samples, "shard_size": config.shard_size, "classes": list(latents.classes)}
    described = to_json({**provenance, **layout})
    provenance["plan"] = hashlib.sha256(described).hexdigest()
    return Header(
        name=f"synthetic {latents.name.removesuffix(' latents')}",
        fields=fields,
        num_samples=config.samples,
        shard_size=config.shard_size,
        classes=latents.classes,
        licence=latents.licence,
        attribution=latents.attribution,
        provenance=provenance,
    )


def commit_hash(commit: Commit) -> str:
    """Identifies a checkpoint by the contents of its files."""
    return hashlib.sha256(to_json([asdict(f) for f in commit.files])).hexdigest()


def _newest(run: Store) -> Commit:
    done = commits(run)
    if not done:
        raise UserError(f"The run {run.uri} has no committed checkpoint; train it first.")
    return done[-1]
