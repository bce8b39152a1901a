"""Find where a classifier fails more: generate, classify, describe the failures, generate again, test what stands out.

python jobs/discover_failures.py configs/discover_failures.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.discovery.loop import discover
from rayproj.discovery.search import DiscoverConfig
from rayproj.report import failures
from rayproj.runtime.command import command
from rayproj.runtime.producer import Pool, PoolConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import Store, to_json
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    discover: DiscoverConfig = field(default_factory=DiscoverConfig)
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("discover_failures", config) as run:
        if run.result:
            return run.result
        with Pool(run, config.pool) as pool:
            found = discover(config.discover, config.run.seed, pool.produce)
        store = Store(config.discover.out)
        store.write("failures.json", to_json(failures.issues(found)))
        store.write("failures.html", failures.page(found).encode())
        store.write("predictions.parquet", failures.predictions(found))
        if folder := store.local_path():
            run.tracker.event({"type": "file", "name": "failures", "path": str(folder / "failures.html")})
        return run.finish(found)


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
