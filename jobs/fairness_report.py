"""Write study.html, study.json and study.png of a fairness study, from what a sweep left behind.

python jobs/fairness_report.py CONFIG.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.report.study import StudyConfig, build
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import Store, to_json
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    study: StudyConfig = field(default_factory=StudyConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("fairness_report", config) as run:
        if run.result:
            return run.result
        found, html, picture = build(config.study)
        store = Store(config.study.root)
        store.write("study.json", to_json(found))
        store.write("study.png", picture)
        store.write("study.html", html.encode())
        return run.finish({"html": f"{store.uri}/study.html", "findings": found["findings"]})


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
