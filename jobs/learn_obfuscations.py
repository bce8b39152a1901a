"""Learn what some obfuscations need: adversarial patches against classifiers of this project, and a network of styles.

python jobs/learn_obfuscations.py configs/learn_obfuscations.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.evaluation.learning import LearnConfig, learn
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    learn: LearnConfig = field(default_factory=LearnConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        return [] if self.cluster.ranks == 1 else ["cluster.ranks must be 1: what is learned here is small."]


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    return learn(config.learn, config.run.seed, Store(config.run.dir), world, link)


def main(config: Config) -> dict[str, Any]:
    with Run.open("learn_obfuscations", config) as run:
        return run.result or run.finish(fit(run, "rayproj.jobs.learn_obfuscations:worker", config.cluster))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
