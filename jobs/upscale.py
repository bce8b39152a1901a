"""Make the images of a dataset larger with a diffusion model that was trained for it, shard by shard, by a pool of actors.

python jobs/upscale.py configs/upscale.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.data.dataset import Dataset, Header, Inputs
from rayproj.responsibility.provenance import Signer
from rayproj.runtime.command import command
from rayproj.runtime.producer import PoolConfig, produce
from rayproj.runtime.run import Run, RunConfig
from rayproj.synthesis.gate import withheld
from rayproj.synthesis.upscaler import UpscaleConfig, plan
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    upscale: UpscaleConfig = field(default_factory=UpscaleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def shards_of(config: Config, inputs: Inputs) -> dict[str, Header]:
    """What is written, as far as it is known before the model and the images are there."""
    header = inputs.header(config.upscale.images, lambda: plan(config.upscale, config.run.seed))
    return {config.upscale.out: header}


def main(config: Config) -> dict[str, Any]:
    with Run.open("upscale", config) as run:
        if run.result:
            return run.result
        signer = Signer(config.upscale.provenance) if config.upscale.provenance.key else None
        dataset = Dataset.create(config.upscale.out, plan(config.upscale, config.run.seed))
        maker = {"out": dataset.uri, "batch": config.upscale.batch, "key": config.upscale.watermark.key}
        made = produce(run, dataset, "rayproj.synthesis.upscaler:Upscaler", config.pool, maker)
        if signer:
            signer.sign_dataset(dataset)
        said = dataset.header.provenance
        withholding = {"withheld": withheld(dataset)} if "safety" in said else {}
        return run.finish({**made, "private": said["private"], **withholding})


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
