"""Judge mixtures of classifiers: a grid of weights, all of it on the same images, without an attack and under several.

python jobs/soup.py configs/soup.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.data.dataset import Dataset
from rayproj.robustness.mixing import SoupConfig, header_of, learned_soups, summary
from rayproj.runtime.command import command
from rayproj.runtime.producer import Pool, PoolConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    soup: SoupConfig = field(default_factory=SoupConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("soup", config) as run:
        if run.result:
            return run.result
        soup, found = config.soup, {}
        with Pool(run, config.pool) as pool:
            for name in soup.sets:
                learned = learned_soups(soup, name, config.run.seed, run.store)
                found[name] = Dataset.create(f"{soup.out}/{name}", header_of(soup, name, config.run.seed, learned))
                pool.produce(found[name], "rayproj.robustness.mixing:Judge", {"out": found[name].uri})
        return run.finish(summary(soup, found.pop("test"), found, config.run.seed))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
