"""Serve a side-by-side study of several models' images to raters until every planned rating is there, and report it.

python jobs/serve_study.py configs/serve_study.yaml key=value ...
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rayproj.errors import Interrupted
from rayproj.preferences.images import prepare
from rayproj.preferences.ratings import Progress
from rayproj.preferences.serving import ServeConfig, bound
from rayproj.preferences.study import StudyConfig
from rayproj.report.preferences import write
from rayproj.runtime import interrupt
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.serving import serving
from rayproj.tracking.progress import say
from rayproj.tracking.tracker import TrackingConfig

LOOK_SECONDS = 1.0


@dataclass
class Config:
    study: StudyConfig = field(default_factory=StudyConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("serve_study", config) as run:
        if run.result:
            return run.result
        plan = prepare(config.study, run.store, config.run.seed)
        for name, count in plan.left_out.items():
            say(f"{count} prompts of the set '{name}' are left out: an image of them does not pass study.safety.")
        progress = Progress(plan, run.store)
        run.tracker.event({"type": "total", "steps": plan.slots})
        with serving(run.id, config.serve.http, lambda: bound(run.store.uri, config.serve)):
            issues = f"'rayproj study tokens {run.store.uri} --raters N' issues tokens for it"
            say(f"The study is at {config.serve.address}; {issues}.")
            if config.serve.open:
                say("Raters' tokens go there as plain text: give serve.certificate and key, or put a proxy before it.")
            known = -1
            while not (taken := progress.taken()).all():
                if (given := int(taken.sum())) != known:
                    known = given
                    run.tracker.event({"type": "metrics", "step": given, "ratings": given})
                if run.stop_wished() or interrupt.requested():
                    raise Interrupted
                time.sleep(LOOK_SECONDS)
        found = write([run.store.uri], f"{run.store.uri}/preferences")
        return run.finish({**found, "prompts_left_out": plan.left_out})


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
