"""The training loop, the same for every Task and Step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayproj import faults
from rayproj.config import below
from rayproj.engine import checkpoint
from rayproj.engine.checkpoint import CheckpointConfig
from rayproj.engine.engine import Engine, EngineConfig, load_flat
from rayproj.engine.flops import flops_per_sample, peak_tflops
from rayproj.engine.steps import Step
from rayproj.engine.task import Batch, Task, Validated
from rayproj.engine.world import World
from rayproj.errors import NonFiniteLoss, UserError
from rayproj.storage.store import Store


class Link(Protocol):
    """A rank's line to whoever started it."""

    attempt: str  # names this start of the group; a restart has another

    def beat(self, step: int | None) -> None:
        """A sign of life: a step is done. None: the last one is, and no more signs are to be expected."""
        ...

    def report(self, event: dict[str, Any]) -> None: ...

    def stop_requested(self) -> bool: ...


class Batches(Protocol):
    """This rank's slices of the global batches, by step."""

    def at(self, step: int) -> Batch: ...


@dataclass
class TrainConfig:
    """One run of the loop."""

    steps: int = 1000  # private training: 0, where privacy.epsilon and privacy.noise_multiplier fix them
    batch: int = 256  # examples in one update, over all ranks; private training has privacy.expected_batch instead
    micro_batch: int = 0  # examples in one forward and backward of a rank; 0: the rank's whole slice
    log_every: int = 10
    preview_every: int = 0  # 0: none
    validate_every: int = 0  # steps between measurements on held-out examples, if the task has any; 0: none
    peak_tflops: float = 0.0  # of one device, for the MFU; 0: known for common GPUs, else there is no MFU
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def problems(self) -> list[str]:
        found = [f"train.{k} must be positive." for k in ("batch", "log_every") if getattr(self, k) <= 0]
        found += below(0, "train", self, "micro_batch", "preview_every", "validate_every", "peak_tflops")
        return found if self.steps >= 0 else [*found, "train.steps must not be negative."]


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
    if not config.steps and not recipe.task.starts_trained:
        raise UserError("There are no steps to train; set train.steps to a positive number.")
    torch.manual_seed(world.rank)  # for layers that draw by themselves, such as dropout; the rest is keyed
    engine = Engine(recipe.task.build(), config.engine, config.steps, world, recipe.step.micro_batches)
    committed = checkpoint.restore(engine, store, warn=lambda text: link.report({"type": "warning", "text": text}))
    _introduce(engine, link, config)
    recipe.step.prepare(engine)
    log = _Log(engine, recipe, link, clock)
    saver = checkpoint.Saver(engine, store, link.attempt, config.checkpoint, lambda step: _committed(link, step))
    saved_at, stop = clock(), False

    while engine.step < config.steps and not stop:
        with engine.timer.phase("data_wait"):
            batch = {name: t.to(world.device, non_blocking=True) for name, t in recipe.batches.at(engine.step).items()}
        log.measure(batch)
        metrics = recipe.step(engine, recipe.task, batch)
        faults.maybe("train.after_step", world.rank)
        saver.check()
        # One message a step carries the metrics and the two decisions that all ranks must take alike.
        save_now = world.rank == 0 and checkpoint.due(config.checkpoint, engine.step, clock() - saved_at)
        *means, save_votes, stop_votes = engine.mean_over_ranks(
            [*metrics.values(), float(save_now), float(link.stop_requested())]
        )
        try:
            log.add(dict(zip(metrics, means, strict=True)), _validated(engine, recipe.task, config))
        except NonFiniteLoss:  # on every rank alike; the commit that is on its way is sound
            saver.wait()
            dist.barrier()
            raise
        stop = stop_votes > 0
        if save_votes > 0 or stop or engine.step == config.steps:
            with engine.timer.phase("checkpoint_stall"):
                saver.save(log.latest)
            saved_at, committed = clock(), engine.step
        if config.preview_every and engine.step % config.preview_every == 0:
            _preview(engine, recipe.task, link)
        link.beat(engine.step)
    if committed != engine.step:
        saver.save(log.latest)
    saver.wait()
    link.beat(None)
    return engine


def _introduce(engine: Engine, link: Link, config: TrainConfig) -> None:
    link.beat(engine.step)
    if engine.world.rank == 0:
        link.report({"type": "total", "steps": config.steps})
        link.report({"type": "resumed", "step": engine.step, "ranks": engine.world.world_size})


def _committed(link: Link, step: int) -> None:
    link.report({"type": "commit", "step": step})


class _Log:
    """Means over the steps since the last report, of running totals the last; rank 0 speaks.

    Attributes:
        latest: the last means, which a commit takes along.
    """

    def __init__(self, engine: Engine, recipe: Recipe, link: Link, clock: Callable[[], float]) -> None:
        self.engine, self.recipe, self.link, self.clock = engine, recipe, link, clock
        self.latest: dict[str, float] = {}
        self.validation: dict[str, float] = {}  # what was measured since the last report
        self.flops_per_sample = 0.0
        self._begin()

    def _begin(self) -> None:
        self.began, self.samples, self.rows = self.clock(), self.engine.samples_seen, list[dict[str, float]]()
        self.engine.timer.read()

    def measure(self, batch: Batch) -> None:
        """Once, on the first batch that has an example: the work in one."""
        if not self.flops_per_sample and len(batch["row"]):
            self.flops_per_sample = flops_per_sample(self.engine, self.recipe.task, batch) * self.recipe.step.views
            self._begin()

    def add(self, metrics: dict[str, float], validation: dict[str, float]) -> None:
        self.validation |= validation
        step, config = self.engine.step, self.recipe.config
        if not all(math.isfinite(value) for value in metrics.values()):
            raise NonFiniteLoss(f"At step {step} the metrics were {metrics}; lower the learning rate and start again.")
        self.rows.append(metrics)
        if step % config.log_every and step != config.steps:
            return
        means = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in metrics}
        now = means | {name: metrics[name] for name in self.recipe.step.running_totals} | self.validation
        self.latest = self.latest | now  # a new one: a commit may still hold the old
        self.validation = {}
        if self.engine.world.rank == 0:
            self.link.report({"type": "metrics", "step": step, **now, **self._pace()})
        wall, seconds = time.time(), self.clock() - self.began
        self._span(f"steps to {step}", wall - seconds, wall)
        self._begin()

    def _pace(self) -> dict[str, float]:
        """Speed of this window, and where its time went."""
        seconds = max(self.clock() - self.began, 1e-9)
        speed = (self.engine.samples_seen - self.samples) / seconds
        per_rank = speed * self.flops_per_sample / self.engine.world.world_size
        peak = self.recipe.config.peak_tflops or peak_tflops(self.engine.world.device)
        return {
            "images_per_second": speed,
            "step_seconds": seconds / len(self.rows),
            **{f"{name}_seconds": value / len(self.rows) for name, value in self.engine.timer.read().items()},
            "tflops_per_rank": per_rank / 1e12,
            **({"mfu": per_rank / 1e12 / peak} if peak else {}),
        }

    def _span(self, what: str, start: float, end: float) -> None:
        rank = f"rank {self.engine.world.rank}"
        self.link.report({"type": "span", "actor": rank, "what": what, "start": start, "end": end})


def _validated(engine: Engine, task: Task, config: TrainConfig) -> dict[str, float]:
    """What the averaged weights do on held-out examples, where it is time for it; on rank 0 alone. Collective."""
    last = engine.step == config.steps
    due = config.validate_every and (last or engine.step % config.validate_every == 0)
    if not due or not isinstance(task, Validated):
        return {}
    weights, found = engine.averaged_weights(), [dict[str, float]()]
    if engine.world.rank == 0:
        found = [task.validate(whole_model(task, weights, engine.world.device))]
    dist.broadcast_object_list(found, src=0)  # whichever rank commits, it takes them along
    return found[0]


def _preview(engine: Engine, task: Task, link: Link) -> None:
    weights = engine.averaged_weights()
    if engine.world.rank != 0:
        return
    images = task.preview(whole_model(task, weights, engine.world.device))
    if images is not None:
        link.report({"type": "images", "name": "preview", "step": engine.step, "images": images})


def whole_model(task: Task, weights: dict[str, Tensor], device: str) -> nn.Module:
    """The task's model with the weights that `Engine.averaged_weights` gives, in eval mode."""
    with torch.random.fork_rng():
        model = task.build()
    load_flat(model, weights)
    return model.to(device).eval()


def summary(engine: Engine, world: World) -> dict[str, Any]:
    """What a finished training says of itself."""
    return {
        "steps": engine.step,
        "samples_seen": engine.samples_seen,
        "parameters": sum(engine.sizes.values()),
        "ranks": world.world_size,
        "zero_stage": engine.config.zero_stage,
        "device": world.device,
    }
