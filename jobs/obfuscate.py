"""Write the images of a dataset under obfuscations, as committed shards, by a pool of makers.

python jobs/obfuscate.py configs/obfuscate.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rayproj.data.dataset import Dataset, Header, Inputs
from rayproj.obfuscation.writing import WriteConfig, header_of
from rayproj.runtime.command import command
from rayproj.runtime.producer import PoolConfig, produce
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    obfuscate: WriteConfig = field(default_factory=WriteConfig)
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def shards_of(config: Config, inputs: Inputs) -> dict[str, Header]:
    return {
        config.obfuscate.out: inputs.header(
            config.obfuscate.images, lambda: header_of(config.obfuscate, config.run.seed)
        )
    }


def main(config: Config) -> dict[str, Any]:
    with Run.open("obfuscate", config) as run:
        if run.result:
            return run.result
        dataset = Dataset.create(config.obfuscate.out, header_of(config.obfuscate, config.run.seed))
        maker = {"config": asdict(config.obfuscate), "out": dataset.uri}
        return run.finish(produce(run, dataset, "rayproj.obfuscation.writing:Writer", config.pool, maker))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
