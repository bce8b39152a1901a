"""Write report.html and report.json of a chain of runs, from what they left behind.

python jobs/report.py configs/report.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.report.build import build
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import Store, to_json
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    root: str = "runs/demo"  # where report.html goes; the stages' paths are relative to it
    stages: dict[str, str] = field(default_factory=dict)  # name in the report -> run dir; {}: every run below root
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("report", config) as run:
        if run.result:
            return run.result
        report, html = build(config.root, config.stages)
        store = Store(config.root)
        store.write("report.json", to_json(report))
        store.write("report.html", html.encode())
        if folder := store.local_path():
            run.tracker.event({"type": "file", "name": "report", "path": str(folder / "report.html")})
        return run.finish({"html": f"{store.uri}/report.html", "json": f"{store.uri}/report.json"})


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
