"""Audit the private training: how much of ε can be seen in what it releases, beside what is claimed.

python jobs/audit_privacy.py configs/audit_privacy.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.engine.training import Link, TrainConfig
from rayproj.engine.world import World
from rayproj.privacy.audit import AuditConfig, audit, audited_plan, require_sound, sentence
from rayproj.privacy.plan import PrivacyConfig
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.progress import say
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    audit: AuditConfig = field(default_factory=AuditConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    return audit(config.audit, config.privacy, config.train, config.run.seed, world, Store(config.run.dir), link)


def main(config: Config) -> dict[str, Any]:
    with Run.open("audit_privacy", config) as run:
        if not run.result:
            audited_plan(config.audit, config.privacy, config.train.steps)  # what is wrong with it is said at once
            run.finish(fit(run, "rayproj.jobs.audit_privacy:worker", config.cluster))
        assert run.result
        say(f"{sentence(run.result)} {run.store.uri}/audit.png shows it.")
        return require_sound(run.result)


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
