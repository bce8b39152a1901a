"""Evaluate classifiers on real test images and under attack, and synthetic datasets against real ones.

python jobs/evaluate.py configs/evaluate.yaml key=value ...
python jobs/evaluate.py configs/evaluate/robustness.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.evaluation.job import EvaluateConfig, evaluate
from rayproj.robustness import checks
from rayproj.robustness.job import RobustnessConfig, header_of, summary
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.producer import Pool, PoolConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.progress import say
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)  # who attacks
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        some = self.evaluate.test or self.robustness.classifiers
        return [] if some else ["There is nothing to evaluate: give evaluate.test, or robustness.classifiers."]


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    return evaluate(config.evaluate, world, link, Store(config.run.dir))


def main(config: Config) -> dict[str, Any]:
    with Run.open("evaluate", config) as run:
        if run.result:
            return run.result
        found = fit(run, "rayproj.jobs.evaluate:worker", config.cluster) if config.evaluate.test else {}
        if config.robustness.classifiers:
            found["robustness"] = under_attack(run, config)
        return run.finish(found)


def under_attack(run: Run, config: Config) -> dict[str, Any]:
    """Attack everything that is to be attacked, each image once, and measure the rest; name -> its tables."""
    wanted, datasets = config.robustness, {}
    with Pool(run, config.pool) as pool:
        for name in wanted.attacked:
            datasets[name] = dataset = Dataset.create(f"{wanted.out}/{name}", header_of(wanted, name, config.run.seed))
            pool.produce(dataset, "rayproj.robustness.job:Attacker", {"out": dataset.uri})
        header = checks.header_of(wanted, datasets, config.run.seed)
        checked = Dataset.create(run.store.at("checks").uri, header)
        pool.produce(checked, "rayproj.robustness.checks:Checker", {"out": checked.uri})
    measured = checks.gathered(checked)
    found = {n: summary(dataset, measured.costs.get(n), measured.probes.get(n)) for n, dataset in datasets.items()}
    for name, signs in measured.masking.items():
        found[name]["masking"] = signs
        for sign in signs:
            if sign["seen"]:
                say(f"{name} may only look robust under {sign['threat']}: {sign['evidence']}")
    for threat, made in measured.transfer.items():
        for name, others in made.items():
            found[name]["threats"][threat]["transfer"] = others
    return found


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
