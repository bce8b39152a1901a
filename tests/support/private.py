"""A small private training, for tests of the step on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayproj import keyed
from rayproj.engine.task import Batch
from rayproj.engine.training import Recipe, train
from rayproj.engine.world import World
from rayproj.privacy.ledger import epsilon_spent, spent
from rayproj.privacy.noise import gaussian
from rayproj.privacy.plan import PrivacyConfig, PrivacyPlan, plan
from rayproj.privacy.sampling import PoissonSampling
from rayproj.privacy.step import PrivateStep
from rayproj.storage.store import Store
from tests.support import regression

KEY = bytes(range(16))
NUM_SAMPLES = 60


class WithoutDropout(regression.Regression):
    def build(self) -> torch.nn.Module:
        model = super().build()
        assert isinstance(model, torch.nn.Sequential)
        model[2] = torch.nn.Identity()
        return model


def mechanism(steps: int, secure_noise: bool = False) -> PrivacyPlan:
    config = PrivacyConfig(noise_multiplier=0.8, delta=1e-3, expected_batch=9, clip_norm=0.6, multiplicity=2)
    config.secure_noise = secure_noise
    return plan(config, NUM_SAMPLES, steps)


class PoissonBatches:
    def __init__(self, sampling: PoissonSampling, rank: int, world_size: int) -> None:
        self.sampling, self.rank, self.world_size = sampling, rank, world_size

    def at(self, step: int) -> Batch:
        mine = np.array_split(self.sampling.indices(step), self.world_size)[self.rank]
        row = torch.tensor([[int(i), step, 0] for i in mine]).reshape(-1, 3)
        data = row.clone()
        data[:, 1] = 0
        return {"x": keyed.normal(1, "data", data, (7,)), "row": row}


def settings(steps: int, zero_stage: int = 2, every_steps: int = 100) -> Any:
    config = regression.config(steps, zero_stage, every_steps=every_steps)
    config.engine.optimizer.clip_grad_norm = 0
    return config


def run(
    world: World,
    uri: str,
    config: Any,
    attempt: str,
    _: str = "",  # named a fault once, and tests/test_faults.py still says that there is none
    stop_after: int | None = None,
    secure_noise: bool = False,
) -> dict[str, Any]:
    """Train privately."""
    plan_ = mechanism(config.steps, secure_noise)
    link, store = regression.Recorder(attempt, stop_after), Store(uri)
    sampling = PoissonSampling(plan_.num_samples, plan_.sample_rate, KEY)
    step = PrivateStep(plan_, KEY, store, chunk=4, unsafe_metrics=True)
    recipe = Recipe(WithoutDropout(), step, PoissonBatches(sampling, world.rank, world.world_size), config)
    engine = train(recipe, world, store, link)
    return {
        "step": engine.step,
        "weights": regression.weights_of(engine),
        "events": link.events,
        "epsilon": epsilon_spent(spent(store), plan_.delta),
        "releases": [(r["step"], r["start"]) for r in spent(store)],
    }


def written_out(steps: int, draw: Callable[..., Tensor] = gaussian) -> dict[str, Tensor]:
    """DP-SGD written out: example by example, view by view, torch's AdamW."""
    task, plan, config = WithoutDropout(), mechanism(steps), settings(steps)
    model, opt = task.build(), config.engine.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=opt.lr, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay
    )
    batches = PoissonBatches(PoissonSampling(plan.num_samples, plan.sample_rate, KEY), 0, 1)
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    for step in range(steps):
        batch, summed = batches.at(step), torch.zeros(total)
        for i in range(len(batch["row"])):
            gradient = torch.zeros(total)
            for view in range(plan.multiplicity):
                one = {name: t[i : i + 1].clone() for name, t in batch.items()}
                one["row"][:, 2] = view
                model.zero_grad()
                task.losses(model, one).sum().backward()
                gradient += torch.cat([p.grad.flatten() for p in parameters]) / plan.multiplicity  # type: ignore[union-attr]
            summed += gradient * min(1.0, plan.clip_norm / gradient.norm().item())
        noise = plan.noise_multiplier * plan.clip_norm * draw(KEY, step, 0, range(total))
        flat, begin = (summed + noise) / 9, 0
        for p in parameters:
            p.grad = flat[begin : begin + p.numel()].view_as(p).clone()
            begin += p.numel()
        for group in optimizer.param_groups:
            group["lr"] = opt.lr * min(1.0, (step + 1) / opt.warmup_steps)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}
