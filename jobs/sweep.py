"""Run a grid of overrides over a job or chain, each point once, and gather what they found in a table.

python jobs/sweep.py configs/sweep.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.sweep import RoomConfig, SweepConfig, sweep
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    sweep: SweepConfig = field(default_factory=SweepConfig)
    run: RunConfig = field(default_factory=RunConfig)
    room: RoomConfig = field(default_factory=RoomConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("sweep", config) as run:
        return run.result or run.finish(sweep(config.sweep, config.room, run))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
