"""Choose, weight and caption images: rules with reasons, near duplicates as weights, further captions from templates.

python jobs/curate.py configs/curate.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.curation.curate import CurateConfig, curate
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    curate: CurateConfig = field(default_factory=CurateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("curate", config) as run:
        return run.result or run.finish(curate(config.curate, run.tracker.event))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
