"""DP-SGD as a Step (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1), sharded by ZeRO."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayproj.engine.engine import Engine, EngineConfig
from rayproj.engine.task import Batch, Task
from rayproj.errors import UserError
from rayproj.privacy.clipping import clipped_sum, refuse_cross_example_layers
from rayproj.privacy.ledger import Ledger, epsilon_spent, next_start, spent
from rayproj.privacy.noise import add_noise, gaussian, secure_gaussian
from rayproj.privacy.plan import ClippingPath, PrivacyPlan
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
        path: how gradients are clipped.
    """

    micro_batches = 1
    running_totals: tuple[str, ...] = ("epsilon",)

    def __init__(
        self,
        plan: PrivacyPlan,
        key: bytes,
        store: Store,
        chunk: int = 8,
        unsafe_metrics: bool = False,
        path: ClippingPath = ClippingPath.auto,
    ) -> None:
        self.plan, self.key, self.store, self.chunk, self.unsafe_metrics = plan, key, store, chunk, unsafe_metrics
        self.path = path
        self.views = plan.multiplicity

    def prepare(self, engine: Engine) -> None:
        """Agree on the number of this start, then prove on the real engine that what reaches the optimizer is the
        clipped noisy sum, before anything private is touched. Collective.

        Raises:
            UserError: the model or the config cannot be trained privately.
            RuntimeError: the engine does not do what is accounted for.
        """
        refuse_cross_example_layers(engine.module)
        refuse_engine(engine.config)
        start: list[Any] = [next_start(self.store), spent(self.store)] if engine.world.rank == 0 else [None, None]
        dist.broadcast_object_list(start, src=0)
        self.ledger = Ledger(self.store, self.plan, self.key, start[0])
        self.records = start[1]  # releases so far, charged to ε whether or not they survived a crash
        self_test(engine, self)

    def __call__(self, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        plan, step = self.plan, engine.step
        with engine.whole_weights():
            flat, losses, norms = clipped_sum(
                engine.plain,
                task.losses,
                engine.parameters,
                batch,
                plan.multiplicity,
                plan.clip_norm,
                self.chunk,
                self.path,
            )
        share = reduce_to_share(engine, flat)
        del flat  # as large as the model
        if engine.world.rank == 0:
            self.ledger.charge(step)
        dist.barrier()  # nobody draws noise for a release that is not on record
        self.records.append(self.ledger.record(step))
        engine.update(self.privatise(engine, share, step), samples=int(plan.normaliser))
        metrics = {"epsilon": epsilon_spent(self.records, plan.delta)}
        if self.unsafe_metrics:
            metrics |= self._private_metrics(engine, losses, norms)
        return metrics

    def privatise(self, engine: Engine, share: Tensor, step: int) -> Tensor:
        """(sum + noise) / normaliser on this rank's share; padding has no noise."""
        plan, start = self.plan, self.ledger.start
        private = share / plan.normaliser
        for run in engine.runs():
            part = slice(run.offset, run.offset + run.length)
            if share.is_cuda and not plan.secure_noise:
                noisy = add_noise(
                    share[part], self.key, step, start, run.start, run.length, plan.noise_std, plan.normaliser
                )
            else:
                draw = secure_gaussian if plan.secure_noise else gaussian
                noise = draw(self.key, step, start, range(run.start, run.start + run.length), str(share.device))
                noisy = noise.mul_(plan.noise_std).add_(share[part]).div_(plan.normaliser)
            private[part] = noisy
        return private

    def _private_metrics(self, engine: Engine, losses: Tensor, norms: Tensor) -> dict[str, float]:
        clipped_or_dropped = ~(norms <= self.plan.clip_norm)
        # An example whose loss is not finite contributed nothing; it must not stop the training through its metrics either.
        sums = [float(len(losses)), float(losses.nan_to_num(0, 0, 0).sum()), float(clipped_or_dropped.sum())]
        count, loss, clipped = engine.mean_over_ranks(sums)
        return {"loss": loss / max(count, 1e-9), "clip_fraction": clipped / max(count, 1e-9)}


def refuse_engine(config: EngineConfig) -> None:
    """Raise UserError for an engine that cannot train privately."""
    if config.optimizer.clip_grad_norm:
        raise UserError("Private training clips each example; set train.engine.optimizer.clip_grad_norm=0.")
    if config.compile:
        raise UserError(
            "Private training looks into the layers, which compiled ones do not show; leave engine.compile off."
        )


def reduce_to_share(engine: Engine, flat: Tensor) -> Tensor:
    """The sum over the ranks of their flat vectors, this rank's share of it. Collective; fp32."""
    dist.all_reduce(flat)
    return engine.take(flat)


def self_test(engine: Engine, step: PrivateStep) -> None:
    """Send known gradients and noise through the real path and look at what the optimizer is given. Collective.

    Every rank has one example whose gradient is many times the clip norm long, one of less than half of it, and one that is
    not finite and must add nothing. Without noise, what reaches the optimizer must be their clipped sum over the ranks over
    the normaliser; and without gradients, noise of the planned size, which no rank, step or start shares with another.
    Nothing is updated, and the noise is of steps that no run reaches.

    Raises:
        RuntimeError: it is not so, on some rank; all of them raise it.
    """
    plan, world = step.plan, engine.world
    noiseless = copy.copy(step)
    noiseless.plan = dataclasses.replace(plan, noise_multiplier=0.0)
    share = reduce_to_share(engine, _known_sum(engine, step))
    signal = engine.gradient_that_reaches_the_optimizer(noiseless.privatise(engine, share, SELF_TEST_STEP))
    expected = torch.zeros(sum(engine.sizes.values()), device=world.device)
    for rank in range(world.world_size):
        direction = _direction(engine, rank)
        _, small = _scales(direction, plan.clip_norm)
        expected += direction * (plan.clip_norm / direction.norm() + small) / plan.normaliser
    made = step.privatise(engine, torch.zeros_like(share), SELF_TEST_STEP)
    noise = engine.gradient_that_reaches_the_optimizer(made)
    wrong = [
        not _close(signal, engine.take(expected), expected.abs().max()),
        not _close(noise, made, made.abs().max()),
        not _is_noise(engine, step),
    ]
    votes = torch.tensor(wrong, dtype=torch.float32, device=world.device)
    dist.all_reduce(votes)
    if votes.any():
        raise RuntimeError(
            "The gradient that reaches DeepSpeed's optimizer is not the clipped noisy sum that privacy is accounted for; "
            "nothing was trained. Use a DeepSpeed version that this project names."
        )


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Equal to rounding; NaN is not."""
    return bool(((found - expected).abs() <= 1e-5 * scale).all())


def _known_sum(engine: Engine, step: PrivateStep) -> Tensor:
    """This rank's clipped sum of three examples whose gradients are known."""
    plan, device = step.plan, engine.world.device
    direction = _direction(engine, engine.world.rank)
    scales = (*_scales(direction, plan.clip_norm), math.nan)
    batch = {
        "row": torch.zeros(len(scales), 3, dtype=torch.int64, device=device),
        "scale": torch.tensor(scales, device=device),
    }

    def losses(model: nn.Module, rows: Batch) -> Tensor:
        """Linear in the parameters, so that the gradient of example b is scale_b times the direction."""
        held, total, begin = dict(model.named_parameters()), torch.zeros((), device=device), 0
        for name, parameter in engine.parameters:
            part = direction[begin : begin + parameter.numel()].view_as(parameter)
            total = total + (held[name] * part).float().sum()
            begin += parameter.numel()
        return rows["scale"] * total

    with engine.whole_weights():
        chunk = min(step.chunk, 2)  # gradients of this many examples are held at once, each as large as the model
        return clipped_sum(engine.plain, losses, engine.parameters, batch, plan.multiplicity, plan.clip_norm, chunk)[0]


def _direction(engine: Engine, rank: int) -> Tensor:
    """A flat vector of 2 and 1/2, which no two ranks have alike."""
    position = torch.arange(sum(engine.sizes.values()), device=engine.world.device)
    return torch.where(position % (engine.world.world_size + 1) == rank, 2.0, 0.5)


def _scales(direction: Tensor, clip_norm: float) -> tuple[float, float]:
    """Factors that make a direction at least ten clip norms long, and at most half of one. Powers of two, as is all of
    the direction, so that the gradients are exact in bf16 too."""
    ratio = clip_norm / direction.double().norm().item()
    return 2.0 ** math.ceil(math.log2(10 * ratio)), 2.0 ** math.floor(math.log2(0.5 * ratio))


def _is_noise(engine: Engine, step: PrivateStep) -> bool:
    """Whether the noise over all ranks, in 20,000 draws or more, has mean 0 and the planned variance, and its sum over the
    ranks, two steps and two starts has the sum of their variances, which it has not if any two of them share their noise.
    At ZeRO-0 all ranks must share it, and their mean has the variance of one."""
    plan, world = step.plan, engine.world
    copies = world.world_size // engine.shares
    total, held = sum(engine.sizes.values()), sum(run.length for run in engine.runs())
    later = copy.copy(step)
    later.ledger = copy.copy(step.ledger)
    later.ledger.start += 1
    zeros = torch.zeros(len(engine.master), device=world.device)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for k in range(-(-20_000 // (3 * total))):
        at, together = SELF_TEST_STEP - 2 * k, torch.zeros_like(zeros)
        for made_by, number in ((step, at), (step, at - 1), (later, at)):
            # Padding has none, so it adds nothing to the sums.
            noise = made_by.privatise(engine, zeros, number).mul_(plan.normaliser / plan.noise_std)
            together += noise
            sums += torch.stack([_sum(noise), _sum(noise.square()), torch.zeros_like(sums[0]), sums.new_tensor(held)])
        dist.all_reduce(together)
        sums[2] += _sum((together / copies).square()) / engine.shares  # each rank has it
    dist.all_reduce(sums)
    sums /= copies
    n = sums[3].item()
    mean, square, shared = (sums[:3] / n).tolist()
    # Six standard errors: a false alarm in 500 million starts. Sums are fewer than draws, so their variance is less certain.
    error, terms = 6 * math.sqrt(2 / n), 3 * engine.shares
    return abs(mean) <= 6 / math.sqrt(n) and abs(square - 1) <= error and abs(shared - 1) <= error * math.sqrt(terms)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)
