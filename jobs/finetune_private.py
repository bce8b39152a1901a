"""Fine-tune a diffusion model on private images with DP-SGD.

python jobs/finetune_private.py configs/finetune_private.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Header
from rayproj.data.loader import Batches
from rayproj.data.reader import Reader
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.training import Link, Recipe, TrainConfig, summary, train
from rayproj.engine.world import World
from rayproj.privacy.budget import register
from rayproj.privacy.ledger import epsilon_spent, secret_key, spent
from rayproj.privacy.plan import PrivacyConfig, plan
from rayproj.privacy.sampling import PoissonSampling
from rayproj.privacy.step import PrivateStep
from rayproj.responsibility.policy import PolicyConfig, judged
from rayproj.responsibility.safety import Safety, SafetyConfig
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    safety: SafetyConfig = field(
        default_factory=SafetyConfig
    )  # what previews have to pass; others are shown as even grey
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # what the previews' prompts may ask for
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        wrong = "diffusion.buckets are not for private training, which draws from one dataset."
        return [wrong] if self.diffusion.buckets else []


def task_of(config: Config, header: Header) -> DiffusionTask:
    return DiffusionTask(config.diffusion, header, config.run.seed)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    store = Store(config.run.dir)
    latents = Dataset.open(config.diffusion.latents)
    header = latents.header
    task = task_of(config, header)
    if config.privacy.unsafe_metrics:
        task.show(world.device, config.train, Safety(config.safety, world.device).greyed)
    mechanism = plan(config.privacy, header.num_samples, config.train.steps)
    config.train.steps = mechanism.steps
    if world.rank == 0:  # at every start: steps that are done again are charged again
        register(latents.store, store, mechanism)
    key = secret_key(store)
    sampling = PoissonSampling(mechanism.num_samples, mechanism.sample_rate, key, mechanism.max_batch)
    batches = Batches(Reader(latents, task.fields), sampling, world.rank, world.world_size)
    asked = config.privacy
    step = PrivateStep(mechanism, key, store, asked.chunk, asked.unsafe_metrics, asked.path)
    engine = train(Recipe(task, step, batches, config.train), world, store, link)
    found, marked = spent(store), {"unsafe_metrics": config.privacy.unsafe_metrics}
    privacy = {"epsilon": epsilon_spent(found, mechanism.delta), "releases": len(found), **marked}
    return {**summary(engine, world), "privacy": {**mechanism.describe(), **privacy}}


def main(config: Config) -> dict[str, Any]:
    config.diffusion.prompts = judged(config.diffusion.prompts, config.policy, "policy")
    with Run.open("finetune_private", config) as run:
        if run.result:
            return run.result
        latents = Dataset.open(config.diffusion.latents)
        register(latents.store, run.store, plan(config.privacy, latents.header.num_samples, config.train.steps))
        return run.finish(fit(run, "rayproj.jobs.finetune_private:worker", config.cluster))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
