"""DP-SGD as a Step (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1), sharded by ZeRO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayproj.engine.engine import Engine
from rayproj.engine.task import Batch, Task
from rayproj.errors import UserError
from rayproj.privacy import accounting
from rayproj.privacy.clipping import clip_factor, clipped_sum, refuse_cross_example_layers
from rayproj.privacy.ledger import Ledger, next_start, spent
from rayproj.privacy.noise import gaussian
from rayproj.privacy.plan import PrivacyPlan
from rayproj.storage.store import Store

SELF_TEST_STEP = 2**32 - 1


class PrivateStep:
    """Clips each example's gradient, sums over the ranks, adds noise to this rank's share, and updates.

    Args:
        plan: the mechanism.
        key: the run's secret bytes.
        store: the run's, for the ledger.
        chunk: examples whose gradients are held at once.
        unsafe_metrics: report loss and share of clipped examples, which are not covered by ε.
    """

    micro_batches = 1

    def __init__(
        self, plan: PrivacyPlan, key: bytes, store: Store, chunk: int = 8, unsafe_metrics: bool = False
    ) -> None:
        self.plan, self.key, self.store, self.chunk, self.unsafe_metrics = plan, key, store, chunk, unsafe_metrics

    def prepare(self, engine: Engine) -> None:
        """Agree on the number of this start, then prove on the real engine that what reaches the optimizer is the
        clipped noisy sum, before anything private is touched. Collective.

        Raises:
            UserError: the model or the config cannot be trained privately.
            RuntimeError: the engine does not do what is accounted for.
        """
        refuse_cross_example_layers(engine.module)
        if engine.config.optimizer.clip_grad_norm:
            raise UserError("Private training clips each example; set train.engine.optimizer.clip_grad_norm=0.")
        start: list[Any] = [next_start(self.store), spent(self.store)] if engine.world.rank == 0 else [None, None]
        dist.broadcast_object_list(start, src=0)
        self.ledger = Ledger(self.store, self.plan, self.key, start[0])
        # Releases so far, by (sample rate, noise multiplier): charged to ε whether or not they survived a crash.
        self.segments = [(r["sample_rate"], r["noise_multiplier"], 1) for r in start[1]]
        self_test(engine, self.plan, self.privatise)

    def __call__(self, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        plan, step = self.plan, engine.step
        flat, losses, norms = clipped_sum(
            engine.module, task.losses, engine.parameters, batch, plan.multiplicity, plan.clip_norm, self.chunk
        )
        share = reduce_to_partition(engine, flat)
        if engine.world.rank == 0:
            self.ledger.charge(step)
        dist.barrier()  # nobody draws noise for a release that is not on record
        self.segments.append((plan.sample_rate, plan.noise_multiplier, 1))
        engine.update(self.privatise(engine, share, step), samples=int(plan.normaliser))
        metrics = {"epsilon": accounting.epsilon_of(self.segments, plan.delta)}
        if self.unsafe_metrics:
            metrics |= self._private_metrics(engine, losses, norms)
        return metrics

    def privatise(self, engine: Engine, share: Tensor, step: int) -> Tensor:
        """(sum + noise) / normaliser on this rank's interval; padding has no noise."""
        noise = gaussian(self.key, step, self.ledger.start, engine.partition, share.device)
        held = sum(p.numel() for _, p in engine.parameters) - engine.partition.start
        noise[max(0, held) :] = 0
        return (share + self.plan.noise_std * noise) / self.plan.normaliser

    def _private_metrics(self, engine: Engine, losses: Tensor, norms: Tensor) -> dict[str, float]:
        sums = [float(len(losses)), float(losses.sum()), float((norms > self.plan.clip_norm).sum())]
        count, loss, clipped = engine.mean_over_ranks(sums)
        return {"loss": loss / max(count, 1e-9), "clip_fraction": clipped / max(count, 1e-9)}


def reduce_to_partition(engine: Engine, flat: Tensor) -> Tensor:
    """The sum over the ranks of their flat vectors, this rank's interval of it. Collective; fp32."""
    size = len(engine.partition)
    padded = torch.zeros(size * engine.world.world_size, dtype=flat.dtype, device=flat.device)
    padded[: len(flat)] = flat
    dist.all_reduce(padded)
    return padded[engine.partition.start : engine.partition.stop]


def self_test(engine: Engine, plan: PrivacyPlan, privatise: Callable[[Engine, Tensor, int], Tensor]) -> None:
    """Send known gradients through the real path and look at what the optimizer is given. Collective.

    Every rank contributes an example whose gradient is known and longer than the clip norm. What reaches the optimizer
    must be their clipped sum over the ranks plus noise of the planned size, over the normaliser. Nothing is updated, and
    the noise is of a step that no run reaches.
    """
    total = sum(p.numel() for _, p in engine.parameters)
    rank, world_size, device = engine.world.rank, engine.world.world_size, engine.world.device
    position = torch.arange(total, device=device)

    def example(of_rank: int) -> Tensor:
        gradient = torch.where(position % (world_size + 1) == of_rank, 2.0, 0.5) * plan.clip_norm
        return gradient * clip_factor(gradient.norm(), plan.clip_norm)

    given = engine.gradient_that_reaches_the_optimizer(
        privatise(engine, reduce_to_partition(engine, example(rank)), SELF_TEST_STEP)
    )
    padded = torch.zeros(len(engine.partition) * world_size, device=device)
    padded[:total] = torch.stack([example(r) for r in range(world_size)]).sum(0)
    expected = padded[engine.partition.start : engine.partition.stop]
    held = max(0, min(len(engine.partition), total - engine.partition.start))
    noise = (given * plan.normaliser - expected)[:held] / plan.noise_std
    # Six standard errors: a false alarm in 500 million starts.
    sound = held == 0 or (
        abs(noise.mean()) <= 6 / math.sqrt(held) and abs(noise.square().mean() - 1) <= 6 * math.sqrt(2 / held)
    )
    if not sound or given[held:].abs().sum() > 0:
        raise RuntimeError(
            "The gradient that reaches DeepSpeed's optimizer is not the clipped noisy sum that privacy is accounted for; "
            "nothing was trained. Use a DeepSpeed version that this project names."
        )
