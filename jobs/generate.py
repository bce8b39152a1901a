"""Generate a synthetic dataset with a trained diffusion model: every planned shard exactly once, by a pool of samplers.

python jobs/generate.py configs/generate.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rayproj.data.dataset import Dataset, Header, Inputs
from rayproj.responsibility.policy import DECISIONS, records
from rayproj.responsibility.provenance import Signer
from rayproj.runtime.command import command
from rayproj.runtime.producer import PoolConfig, produce
from rayproj.runtime.run import Run, RunConfig
from rayproj.synthesis.gate import withheld
from rayproj.synthesis.plan import GenerateConfig, decisions_of, plan, shards_in_a_row
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    consumers: list[str] = field(default_factory=list)  # trainings that read while this writes; it stays near them
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def shards_of(config: Config, inputs: Inputs) -> dict[str, Header]:
    """What is written, as far as it is known before the model is there."""
    header = inputs.header(config.generate.model, lambda: plan(config.generate, config.run.seed))
    header = replace(
        header.only("image", "label", "seed"),
        num_samples=config.generate.samples,
        shard_size=config.generate.shard_size,
    )
    return {config.generate.out: header}


def main(config: Config) -> dict[str, Any]:
    with Run.open("generate", config) as run:
        if run.result:
            return run.result
        if record := records(decisions_of(config.generate)):
            run.store.write(DECISIONS, record)
        signer = Signer(config.generate.provenance) if config.generate.provenance.key else None
        dataset = Dataset.create(config.generate.out, plan(config.generate, config.run.seed))
        maker = {"out": dataset.uri, "batch": config.generate.batch, "key": config.generate.watermark.key}
        entry, together = "rayproj.synthesis.synthesizer:Synthesizer", shards_in_a_row(config.generate)
        made = produce(run, dataset, entry, config.pool, maker, config.consumers, together)
        if signer:
            signer.sign_dataset(dataset)
        said = dataset.header.provenance
        made |= {name: said[name] for name in ("private", "policy") if name in said}
        return run.finish({**made, **({"withheld": withheld(dataset)} if "safety" in said else {})})


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
