"""The training loop, the same for every Task and Step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rayproj import faults
from rayproj.engine import checkpoint
from rayproj.engine.checkpoint import CheckpointConfig
from rayproj.engine.engine import Engine, EngineConfig
from rayproj.engine.steps import Step
from rayproj.engine.task import Batch, Task
from rayproj.engine.world import World
from rayproj.errors import NonFiniteLoss
from rayproj.storage.store import Store


class Link(Protocol):
    """A rank's line to whoever started it."""

    attempt: str  # names this start of the group; a restart has another

    def report(self, event: dict[str, Any]) -> None: ...

    def stop_requested(self) -> bool: ...


class Batches(Protocol):
    """This rank's slices of the global batches, by step."""

    def at(self, step: int) -> Batch: ...


@dataclass
class TrainConfig:
    """One run of the loop."""

    steps: int = 1000
    batch: int = 256  # examples in one update, over all ranks; private training has privacy.expected_batch instead
    micro_batch: int = 0  # examples in one forward and backward of a rank; 0: the rank's whole slice
    log_every: int = 10
    preview_every: int = 0  # 0: none
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def problems(self) -> list[str]:
        found = [f"train.{k} must be positive." for k in ("steps", "batch", "log_every") if getattr(self, k) <= 0]
        return found


@dataclass
class Recipe:
    """Everything that a rank needs to train."""

    task: Task
    step: Step
    batches: Batches
    config: TrainConfig


def train(
    recipe: Recipe, world: World, store: Store, link: Link, clock: Callable[[], float] = time.monotonic
) -> Engine:
    """Train until `recipe.config.steps` updates are done or a stop is requested. Collective.

    Resumes from the newest sound commit below `store`, and leaves one behind. Returns the engine, whose `step` tells
    whether the plan was completed.
    """
    config = recipe.config
    torch.manual_seed(world.rank)  # for layers that draw by themselves, such as dropout; the rest is keyed
    engine = Engine(recipe.task.build(), config.engine, config.steps, world, recipe.step.micro_batches)
    resumed = checkpoint.restore(engine, store, warn=lambda text: link.report({"type": "warning", "text": text}))
    if world.rank == 0:
        link.report({"type": "total", "steps": config.steps})
        link.report({"type": "resumed", "step": engine.step})
    recipe.step.prepare(engine)
    log = _Log(engine, link, config.log_every, recipe.step.running_totals, clock)
    saved_at, committed, stop = clock(), resumed, False

    while engine.step < config.steps and not stop:
        batch = {name: t.to(world.device, non_blocking=True) for name, t in recipe.batches.at(engine.step).items()}
        metrics = recipe.step(engine, recipe.task, batch)
        faults.maybe("train.after_step", world.rank)
        # One message a step carries the metrics and the two decisions that all ranks must take alike.
        save_now = world.rank == 0 and checkpoint.due(config.checkpoint, engine.step, clock() - saved_at)
        *means, save_votes, stop_votes = engine.mean_over_ranks(
            [*metrics.values(), float(save_now), float(link.stop_requested())]
        )
        log.add(dict(zip(metrics, means, strict=True)))
        stop = stop_votes > 0
        if save_votes > 0 or stop or engine.step == config.steps:
            _save(engine, store, link, config.checkpoint, clock)
            saved_at, committed = clock(), engine.step
        if config.preview_every and engine.step % config.preview_every == 0:
            _preview(engine, recipe.task, link)
    if committed != engine.step:
        _save(engine, store, link, config.checkpoint, clock)
    return engine


class _Log:
    """Means over the steps since the last report, of running totals the last; rank 0 speaks."""

    def __init__(
        self, engine: Engine, link: Link, every: int, running_totals: tuple[str, ...], clock: Callable[[], float]
    ) -> None:
        self.engine, self.link, self.every, self.clock = engine, link, every, clock
        self.running_totals = running_totals
        self.began, self.samples = clock(), engine.samples_seen
        self.rows: list[dict[str, float]] = []

    def add(self, metrics: dict[str, float]) -> None:
        step = self.engine.step
        if not all(math.isfinite(value) for value in metrics.values()):
            raise NonFiniteLoss(f"At step {step} the metrics were {metrics}; lower the learning rate and start again.")
        self.rows.append(metrics)
        if step % self.every and step != self.engine.steps:
            return
        seconds, wall = self.clock() - self.began, time.time()
        means = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in metrics}
        means |= {name: metrics[name] for name in self.running_totals}
        speed = (self.engine.samples_seen - self.samples) / max(seconds, 1e-9)
        if self.engine.world.rank == 0:
            self.link.report({"type": "metrics", "step": step, **means, "images_per_second": speed})
        self.link.report(
            {
                "type": "span",
                "actor": f"rank {self.engine.world.rank}",
                "what": f"steps to {step}",
                "start": wall - seconds,
                "end": wall,
            }
        )
        self.began, self.samples, self.rows = self.clock(), self.engine.samples_seen, []


def _save(engine: Engine, store: Store, link: Link, config: CheckpointConfig, clock: Callable[[], float]) -> None:
    began = clock()
    won = checkpoint.save(engine, store, link.attempt, config)
    wall, seconds = time.time(), clock() - began
    link.report(
        {
            "type": "span",
            "actor": f"rank {engine.world.rank}",
            "what": f"checkpoint {engine.step}",
            "start": wall - seconds,
            "end": wall,
        }
    )
    if won:
        link.report({"type": "commit", "step": engine.step})


def _preview(engine: Engine, task: Task, link: Link) -> None:
    with engine.ema_weights() as model:
        images = task.preview(model) if engine.world.rank == 0 else None
    if images is not None:
        link.report({"type": "images", "name": "preview", "step": engine.step, "images": images})


def summary(engine: Engine, world: World) -> dict[str, Any]:
    """What a finished training says of itself."""
    return {
        "steps": engine.step,
        "samples_seen": engine.samples_seen,
        "parameters": sum(parameter.numel() for _, parameter in engine.parameters),
        "ranks": world.world_size,
        "zero_stage": engine.config.zero_stage,
        "device": world.device,
    }
