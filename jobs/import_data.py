"""Import real images into datasets of committed webdataset shards, split without leaks.

python jobs/import_data.py configs/import_data.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.data.dataset import Header, Inputs
from rayproj.data.importing import ImportConfig, headers, import_dataset
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    data: ImportConfig = field(default_factory=ImportConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def shards_of(config: Config, inputs: Inputs) -> dict[str, Header]:
    return headers(config.data, inputs)


def main(config: Config) -> dict[str, Any]:
    with Run.open("import_data", config) as run:
        return run.result or run.finish(import_dataset(config.data, run.tracker.event))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
