"""Train a latent diffusion model on a rank group.

python jobs/train_diffusion.py configs/train_diffusion.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Header
from rayproj.data.loader import Bucketed, pooled
from rayproj.data.order import Buckets
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.steps import PlainStep, world_sizes
from rayproj.engine.training import Link, Recipe, TrainConfig, summary, train
from rayproj.engine.world import World
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
    train: TrainConfig = field(default_factory=TrainConfig)
    safety: SafetyConfig = field(
        default_factory=SafetyConfig
    )  # what previews have to pass; others are shown as even grey
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # what the previews' prompts may ask for
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def task_of(config: Config, header: Header) -> DiffusionTask:
    return DiffusionTask(config.diffusion, header, config.run.seed)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    datasets = [Dataset.open(uri) for uri in (config.diffusion.latents, *config.diffusion.buckets)]
    task = task_of(config, datasets[0].header)
    task.take([latents.header for latents in datasets[1:]])
    task.show(world.device, config.train, Safety(config.safety, world.device).greyed)
    batch, seed = config.train.batch, config.run.seed
    shapes: dict[tuple[int, ...], list[Dataset]] = {}
    for latents in datasets:
        shapes.setdefault(latents.header.fields["moments"].shape, []).append(latents)
    parts = [pooled(alike, task.fields, batch, seed, world.rank, world.world_size) for alike in shapes.values()]
    sizes = [sum(latents.header.num_samples for latents in alike) for alike in shapes.values()]
    batches = Bucketed(parts, Buckets(sizes, batch, seed))
    step = PlainStep(config.train.batch, config.train.micro_batch, world.world_size)
    engine = train(Recipe(task, step, batches, config.train), world, Store(config.run.dir), link)
    return summary(engine, world)


def main(config: Config) -> dict[str, Any]:
    config.diffusion.prompts = judged(config.diffusion.prompts, config.policy, "policy")
    with Run.open("train_diffusion", config) as run:
        worlds = world_sizes(config.train.batch, config.train.micro_batch)
        return run.result or run.finish(fit(run, "rayproj.jobs.train_diffusion:worker", config.cluster, worlds))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
