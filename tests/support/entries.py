"""What the ranks and makers of the runtime's tests do."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.engine.task import Batch
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import RunConfig
from rayproj.tracking.tracker import TrackingConfig, WandbMode
from tests.support import images, regression


@dataclass
class RunOnly:
    """The config of a job that has nothing of its own."""

    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(wandb=WandbMode.disabled))
    steps: int = 1
    pause: float = 0.0  # seconds that a step takes longer
    dropout: bool = True
    every_steps: int = 4  # between commits


def sum_of_ranks(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    value = torch.tensor([float(world.rank + 1)])
    dist.all_reduce(value)
    return {"sum": value.item(), "world_size": world.world_size, "cwd": os.getcwd()}


def train_regression(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    (Path(config["run"]["dir"]) / f"pid-{world.rank}").write_text(str(os.getpid()))
    found = regression.run(world, config["run"]["dir"], regression.config(10), link.attempt, link=link)
    weights = {name: tensor.tolist() for name, tensor in found["weights"].items()}
    return {"step": found["step"], "weights": weights, "attempt": link.attempt}


class Slow(regression.Regression):
    """Time for something to happen; the numbers are those of the quick one."""

    def __init__(self, pause: float, dropout: float) -> None:
        super().__init__(dropout)
        self.pause = pause

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        time.sleep(self.pause)
        return super().losses(model, batch)


def train_slowly(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    pids = Path(os.environ["RAYPROJ_TEST_PIDS"], config["run"]["dir"].rpartition("/")[2])
    pids.mkdir(exist_ok=True)
    (pids / str(world.rank)).write_text(str(os.getpid()))
    settings = regression.config(config["steps"], every_steps=config["every_steps"])
    task = Slow(config["pause"], 0.2 if config["dropout"] else 0.0)
    found = regression.run(world, config["run"]["dir"], settings, link.attempt, task=task, link=link)
    weights = {name: tensor.tolist() for name, tensor in found["weights"].items()}
    return {"step": found["step"], "weights": weights, "ranks": world.world_size}


class Bursting(regression.Regression):
    """Its loss is infinite from a step on."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().losses(model, batch) / (batch["row"][:, 1:2] < 6)


def train_to_infinity(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    settings = regression.config(config["steps"])
    regression.run(world, config["run"]["dir"], settings, link.attempt, task=Bursting(), link=link)
    return {}


def eats_memory(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    """Rank 1 takes 100 MiB after another, until it is ended."""
    link.beat(0)
    kept = []
    while not link.stop_requested():
        if world.rank == 1:
            kept.append(np.ones(100 << 17))
        time.sleep(0.05)
    return {}


def user_error(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    (Path(config["run"]["dir"]) / f"called-{world.rank}-{link.attempt}").touch()
    if world.rank == 1:
        raise UserError("The learning rate is a fish; give a number.")
    dist.barrier()
    return {}


def always_dies(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def runs_until_stopped(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    link.report({"type": "metrics", "step": 1, "loss": 1.0})
    (Path(config["run"]["dir"]) / f"running-{world.rank}").touch()
    while not link.stop_requested():
        time.sleep(0.05)
    (Path(config["run"]["dir"]) / f"stopped-{world.rank}").touch()
    return {"stopped": True}


def waits_for_data(config: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    """Reads a shard that nobody makes."""
    dataset = Dataset.create(f"{config['run']['dir']}/data", images.header())
    Reader(dataset, stop=link.stop_requested).gather(np.array([0]))
    return {}


class Maker:
    """Makes shards of `images`; dies or hangs once, at a given shard, if told to."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.config, self.header = config, images.header()
        if config.get("start") == "KeyError":
            raise KeyError("x")
        if config.get("start") == "UserError":
            raise UserError("The model is gone; train it again.")

    def make(self, shard: int) -> list[dict[str, Any]]:
        with open(Path(self.config["log"]), "a") as file:
            file.write(f"{shard}\n")
        with open(Path(self.config["log"]).with_suffix(".pids"), "a") as file:
            file.write(f"{os.getpid()}\n")
        if "pause" in self.config:
            Path(self.config["log"]).with_name(f"maker-{os.getpid()}").touch()
            time.sleep(float(self.config["pause"]))
        once = Path(self.config["log"]).with_suffix(".died")
        if shard == self.config.get("die_at") and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == self.config.get("hang_at") and not once.exists():
            once.touch()
            time.sleep(600)
        if shard == self.config.get("poison"):
            raise ValueError("this shard cannot be made")
        if shard == self.config.get("user_error"):
            raise UserError("The model is gone; train it again.")
        header = images.header(10**6, 2) if "pause" in self.config else self.header
        return [images.sample(i) for i in header.shard_range(shard)]
