"""DP-SGD as a Step (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1), sharded by ZeRO."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayproj.engine.engine import Engine
from rayproj.engine.task import Batch, Task
from rayproj.errors import UserError
from rayproj.privacy import accounting
from rayproj.privacy.clipping import clipped_sum, refuse_cross_example_layers
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
        self_test(engine, self)

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


def self_test(engine: Engine, step: PrivateStep) -> None:
    """Send known gradients through the real path and look at what the optimizer is given. Collective.

    Every rank has one example whose gradient is ten times the clip norm long and one of half of it. With and without
    them, at the same noise, what reaches the optimizer must differ by their clipped sum over the ranks; and what is left
    must be noise of the planned size. Nothing is updated, and the noise is of steps that no run reaches.

    Raises:
        RuntimeError: it is not so.
    """
    plan, world = step.plan, engine.world
    direction = _direction(engine, world.rank)
    unit = direction / direction.norm()
    batch = {
        "row": torch.zeros(2, 3, dtype=torch.int64, device=world.device),
        "scale": torch.tensor([10.0, 0.5], device=world.device) * plan.clip_norm,
    }

    def losses(model: nn.Module, rows: Batch) -> Tensor:
        """Linear in the parameters, so that the gradient of example b is scale_b times the unit vector."""
        held, total, begin = dict(model.named_parameters()), torch.zeros((), device=world.device), 0
        for name, parameter in engine.parameters:
            part = unit[begin : begin + parameter.numel()].view_as(parameter)
            total = total + (held[name] * part).float().sum()
            begin += parameter.numel()
        return rows["scale"] * total

    flat, _, _ = clipped_sum(
        engine.module, losses, engine.parameters, batch, plan.multiplicity, plan.clip_norm, step.chunk
    )
    nothing = torch.zeros_like(flat)
    signal, noise = (
        engine.gradient_that_reaches_the_optimizer(
            step.privatise(engine, reduce_to_partition(engine, vector), SELF_TEST_STEP)
        )
        for vector in (flat, nothing)
    )
    expected = torch.zeros(len(engine.partition) * world.world_size, device=world.device)
    for rank in range(world.world_size):
        other = _direction(engine, rank)
        expected[: len(other)] += 1.5 * plan.clip_norm * other / other.norm() / plan.normaliser
    difference = signal - noise - expected[engine.partition.start : engine.partition.stop]
    rounding = 1e-5 * (plan.noise_std / plan.normaliser + expected.abs().max())
    if difference.abs().max() > rounding or not _is_noise(engine, step):
        raise RuntimeError(
            "The gradient that reaches DeepSpeed's optimizer is not the clipped noisy sum that privacy is accounted for; "
            "nothing was trained. Use a DeepSpeed version that this project names."
        )


def _direction(engine: Engine, rank: int) -> Tensor:
    position = torch.arange(sum(p.numel() for _, p in engine.parameters), device=engine.world.device)
    return torch.where(position % (engine.world.world_size + 1) == rank, 2.0, 0.5)


def _is_noise(engine: Engine, step: PrivateStep) -> bool:
    """Whether the noise over all ranks, of enough steps for 20,000 draws, has mean 0 and the planned variance."""
    total = sum(p.numel() for _, p in engine.parameters)
    held = max(0, min(len(engine.partition), total - engine.partition.start))
    zeros = torch.zeros(len(engine.partition), device=engine.world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=engine.world.device)
    for k in range(-(-20_000 // total)):
        noise = step.privatise(engine, zeros, SELF_TEST_STEP - k)[:held].double() * step.plan.normaliser
        sums += torch.stack([noise.sum(), noise.square().sum(), torch.full_like(noise.sum(), held)])
    dist.all_reduce(sums)
    mean, square = (sums[:2] / sums[2] / torch.tensor([step.plan.noise_std, step.plan.noise_std**2]).to(sums)).tolist()
    # Six standard errors: a false alarm in 500 million starts.
    n = sums[2].item()
    return abs(mean) <= 6 / math.sqrt(n) and abs(square - 1) <= 6 * math.sqrt(2 / n)
