"""Judge epistemic networks, such as epinets and ensembles, in distribution and under shift; write a report beside the run.

python jobs/evaluate_shift.py configs/evaluate_shift.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.evaluation.shift import ShiftConfig, evaluate
from rayproj.report.shift import page
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    return evaluate(configuration.from_dict(Config, values).shift, world, link)


def main(config: Config) -> dict[str, Any]:
    with Run.open("evaluate_shift", config) as run:
        if run.result:
            return run.result
        result = run.finish(fit(run, "rayproj.jobs.evaluate_shift:worker", config.cluster))
        Store(config.run.dir).write("report.html", page(result).encode())
        return result


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
