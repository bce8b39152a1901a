"""A small task with keyed data, for tests of the engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from rayproj import keyed
from rayproj.engine.checkpoint import CheckpointConfig
from rayproj.engine.engine import Engine, EngineConfig, OptimizerConfig
from rayproj.engine.steps import PlainStep
from rayproj.engine.task import Batch
from rayproj.engine.training import Recipe, TrainConfig, train
from rayproj.engine.world import World
from rayproj.storage.store import Store


class Regression:
    starts_trained = False

    def __init__(self, dropout: float = 0.2) -> None:
        self.dropout = dropout

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(13, 1))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        noisy = batch["x"] + 0.1 * keyed.normal(0, "noise", batch["row"], (7,))
        return (model(noisy) - batch["x"].sum(1, keepdim=True)).square().mean(1)

    def preview(self, model: nn.Module) -> np.ndarray | None:
        return np.zeros((1, 1, 2, 2), np.uint8)


class KeyedBatches:
    """12 examples a step, made from their key."""

    size = 12

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def at(self, step: int) -> Batch:
        row = torch.tensor([[i, step, 0] for i in range(self.size)])
        row = row[torch.from_numpy(np.array_split(np.arange(self.size), self.world_size)[self.rank])]
        return {"x": keyed.normal(1, "data", row, (7,)), "row": row}


class Recorder:
    """A Link that keeps what is reported, and asks to stop after a given step."""

    def __init__(self, attempt: str, stop_after: int | None = None) -> None:
        self.attempt, self.stop_after = attempt, stop_after
        self.events: list[dict[str, Any]] = []
        self.calls = 0

    def report(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def beat(self, step: int | None) -> None:
        pass

    def stop_requested(self) -> bool:
        self.calls += 1
        return self.stop_after is not None and self.calls >= self.stop_after


def config(
    steps: int, zero_stage: int = 2, micro_batch: int = 0, every_steps: int = 4, keep_last: int = 2
) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch=KeyedBatches.size,
        micro_batch=micro_batch,
        log_every=2,
        engine=EngineConfig(
            zero_stage=zero_stage, ema=0.9, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1)
        ),
        checkpoint=CheckpointConfig(every_steps=every_steps, every_seconds=0, keep_last=keep_last),
    )


def run(
    world: World,
    uri: str,
    settings: TrainConfig,
    attempt: str,
    task: Any = None,
    stop_after: int | None = None,
    link: Any = None,
) -> dict[str, Any]:
    """Train; returns what this rank holds at the end."""
    link = link or Recorder(attempt, stop_after)
    step = PlainStep(settings.batch, settings.micro_batch, world.world_size)
    recipe = Recipe(task or Regression(), step, KeyedBatches(world.rank, world.world_size), settings)
    engine = train(recipe, world, Store(uri), link)
    return {
        "step": engine.step,
        "weights": weights_of(engine),
        "ema": {name: tensor for name, tensor in engine.averaged_weights().items()},
        "events": getattr(link, "events", []),
    }


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """The trained parameters, whole, at any ZeRO stage."""
    with deepspeed.zero.GatheredParameters([p for _, p in engine.parameters], enabled=engine.config.zero_stage == 3):
        return {name: p.detach().clone() for name, p in engine.parameters}
