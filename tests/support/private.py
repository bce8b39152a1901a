"""A small private training, for tests of the step on real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj import keyed
from rayproj.engine.task import Batch
from rayproj.engine.training import Recipe, train
from rayproj.engine.world import World
from rayproj.privacy import clipping
from rayproj.privacy import step as step_module
from rayproj.privacy.ledger import epsilon_spent, spent
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
    fault: str = "",
    stop_after: int | None = None,
    secure_noise: bool = False,
) -> dict[str, Any]:
    """Train privately; `fault` breaks the mechanism in a named way, which the self-test should see."""
    if fault == "noise too small":
        original = step_module.gaussian
        step_module.gaussian = lambda *a: original(*a) / world.world_size**0.5  # type: ignore[assignment]
    elif fault == "sum of one rank only":
        step_module.reduce_to_share = lambda engine, flat: engine.take(flat)  # type: ignore[assignment]
    elif fault == "no clipping":
        clipping.clip_factor = lambda norm, c: torch.ones_like(norm)  # type: ignore[assignment]
    plan_ = mechanism(config.steps, secure_noise)
    link, store = regression.Recorder(attempt, stop_after), Store(uri)
    sampling = PoissonSampling(plan_.num_samples, plan_.sample_rate, KEY)
    step = PrivateStep(plan_, KEY, store, chunk=4, unsafe_metrics=True)
    if fault == "engine ignores the gradient":
        step.prepare = _deaf(step.prepare)  # type: ignore[method-assign]
    recipe = Recipe(WithoutDropout(), step, PoissonBatches(sampling, world.rank, world.world_size), config)
    engine = train(recipe, world, store, link)
    return {
        "step": engine.step,
        "weights": regression.weights_of(engine),
        "events": link.events,
        "epsilon": epsilon_spent(spent(store), plan_.delta),
        "releases": [(r["step"], r["start"]) for r in spent(store)],
    }


def _deaf(prepare: Any) -> Any:
    def wrapped(engine: Any) -> None:
        original = engine.gradient_that_reaches_the_optimizer
        engine.gradient_that_reaches_the_optimizer = lambda g: original(torch.zeros_like(g))
        prepare(engine)

    return wrapped
