"""Evaluate classifiers on real test images, and synthetic datasets against real ones.

python jobs/evaluate.py configs/evaluate.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.evaluation.job import EvaluateConfig, evaluate
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    return evaluate(config.evaluate, world, link, Store(config.run.dir))


def main(config: Config) -> dict[str, Any]:
    with Run.open("evaluate", config) as run:
        return run.result or run.finish(fit(run, "rayproj.jobs.evaluate:worker", config.cluster))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
