"""Private training with faults injected into the real code: each must make a check fail, and without it the check passes.

The checks are of three kinds: what a run does of its own accord (the self-test at its start, the trial of book-keeping, the
ledger), what the ordinary tests look at (`tests.support.checks`), and the one-run audit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pytest import MonkeyPatch
from torch import Tensor, nn

from rayproj.engine.engine import Engine
from rayproj.engine.task import Batch, Task
from rayproj.engine.world import World
from rayproj.kernels import gram, philox
from rayproj.privacy import clipping, layers, ledger, noise
from rayproj.privacy import step as step_module
from rayproj.privacy.clipping import with_views
from rayproj.privacy.plan import PrivacyPlan
from rayproj.privacy.sampling import PoissonSampling
from rayproj.privacy.step import PrivateStep
from rayproj.privacy.tape import Call, Tape
from tests.support import checks, private
from tests.support.ranks import run_ranks


class Check(NamedTuple):
    """One of `checks`, on so many ranks, and a part of what it says when it fails."""

    ranks: int
    run: Callable[[World, str], None]
    says: str


CHECKS = {
    "self-test": Check(2, checks.the_start_is_not_refused, "is not the clipped noisy sum"),
    "trial": Check(1, lambda *_: checks.bookkeeping_is_trusted(), "clipping went the slow way"),
    "ledger": Check(1, lambda _, uri: checks.a_release_that_is_done_again_is_charged_again(uri), "charged a"),
    "record": Check(2, checks.noise_is_drawn_for_what_is_on_record, "is not on record"),
    "reference": Check(2, checks.training_equals_dp_sgd_written_out, "not close"),
    "Gaussian": Check(1, lambda *_: checks.noise_is_gaussian(noise.gaussian), "the noise is not Gaussian"),
    "independence": Check(1, lambda *_: checks.noises_are_independent(noise.gaussian), "are not independent"),
    "Poisson": Check(1, lambda *_: checks.inclusion_is_poisson(), "not Poisson"),
    "audit": Check(1, checks.the_audit_does_not_refute, "refutes the claim"),
}

Inject = Callable[[MonkeyPatch, World], None]


def _draw(change: Callable[..., Tensor]) -> Inject:
    """The generator under all noise, changed: (the real one, words, step, start, interval) to noise."""
    real = philox.flat_normal
    return lambda patch, world: patch.setattr(
        philox, "flat_normal", lambda words, step, start, i, *a: change(real, words, step, start, i, *a)
    )


def _uniform(real: Any, words: Any, step: int, start: int, interval: range, *a: Any) -> Tensor:
    normal = real(words, step, start, interval, *a)
    return math.sqrt(3) * torch.erf(normal / math.sqrt(2))  # of variance 1


def _repeated(real: Any, words: Any, step: int, start: int, interval: range, *a: Any) -> Tensor:
    return real(words, step, start, range(1000), *a)[torch.tensor(interval) % 1000]


def _sum_of_one_rank(patch: MonkeyPatch, world: World) -> None:
    patch.setattr(step_module, "reduce_to_share", lambda engine, flat: engine.take(flat))


def _noise_of_each_rank_on_the_sum(patch: MonkeyPatch, world: World) -> None:
    reduce, std = step_module.reduce_to_share, private.mechanism(1).noise_std

    def noisy(engine: Engine, flat: Tensor) -> Tensor:
        return reduce(engine, flat + std * noise.gaussian(private.KEY, engine.step, world.rank, range(len(flat))))

    patch.setattr(step_module, "reduce_to_share", noisy)


def _no_clipping(patch: MonkeyPatch, world: World) -> None:
    patch.setattr(clipping, "clip_factor", lambda norm, c: torch.ones_like(norm))


def _no_clipping_on_rank_1(patch: MonkeyPatch, world: World) -> None:
    if world.rank == 1:
        _no_clipping(patch, world)


def _what_is_not_finite_is_kept(patch: MonkeyPatch, world: World) -> None:
    patch.setattr(clipping, "clip_factor", lambda norm, c: c / norm.clamp(min=c))


def _clipped(change: Callable[..., Any]) -> Inject:
    """The clipped sum, changed: (the real one, model, losses, parameters, batch, views, clip norm) to what it gives."""
    real = clipping.clipped_sum
    return lambda patch, world: patch.setattr(step_module, "clipped_sum", lambda *a, **k: change(real, *a[:6]))


def _last_layer_unclipped(real: Any, model: Any, losses: Any, parameters: Any, batch: Any, *a: Any) -> Any:
    rest, *others = real(model, losses, parameters[:-1], batch, *a)
    return torch.cat([rest, real(model, losses, parameters[-1:], batch, a[0], 1e9)[0]]), *others


def _each_layer_by_itself(real: Any, model: Any, losses: Any, parameters: Any, batch: Any, *a: Any) -> Any:
    found = [real(model, losses, [one], batch, *a) for one in parameters]
    return torch.cat([total for total, _, _ in found]), *found[0][1:]


def _each_view_an_example(real: Any, model: Any, losses: Any, parameters: Any, batch: Any, k: int, c: float) -> Any:
    return real(model, losses, parameters, with_views(batch, k), 1, c)


def _the_engine_ignores_the_gradient(patch: MonkeyPatch, world: World) -> None:
    reaches = Engine.gradient_that_reaches_the_optimizer
    patch.setattr(
        Engine, "gradient_that_reaches_the_optimizer", lambda engine, share: reaches(engine, torch.zeros_like(share))
    )


def _deepspeed_clips(patch: MonkeyPatch, world: World) -> None:
    real = Engine.__init__

    def init(engine: Engine, *a: Any, **k: Any) -> None:
        real(engine, *a, **k)
        engine.optimizer.clip_grad = 0.1

    patch.setattr(Engine, "__init__", init)


def _rule(layer: type[nn.Module], change: Callable[[Any, Tape, Call, Tensor, bool], None]) -> Inject:
    """The book-keeping of a kind of layer, changed."""
    real = layers.RULES[layer.forward]
    return lambda patch, world: patch.setitem(layers.RULES, layer.forward, lambda *a: change(real, *a))


def _bias_norm_token_by_token(real: Any, tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    """Σ_t |g_t|² for |Σ_t g_t|², as in Opacus until 1.5.4 (its pull request 751)."""
    real(tape, call, g, alone)
    tokens = g.reshape(tape.size, -1, g.shape[-1])
    tape.squares += tokens.square().sum((1, 2)) - tokens.sum(1).square().sum(1)


def _outside_the_norm(real: Any, tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    squares = tape.squares.clone()
    real(tape, call, g, alone)
    tape.squares.copy_(squares)


def _gram_of_equal_tokens(patch: MonkeyPatch, world: World) -> None:
    """Its diagonal: Σ_t |x_t|² |g_t|²."""
    patch.setattr(gram, "linear_gram_norm", lambda x, g: (x.square().sum(2) * g.square().sum(2)).sum(1))


def _factors_left_out(patch: MonkeyPatch, world: World) -> None:
    real = Tape.add_to
    patch.setattr(Tape, "add_to", lambda tape, flat, factors: real(tape, flat, torch.ones_like(factors)))


def _sampling(indices: Callable[[PoissonSampling, int], np.ndarray]) -> Inject:
    return lambda patch, world: patch.setattr(PoissonSampling, "indices", indices)


def _shuffled(sampling: PoissonSampling, step: int) -> np.ndarray:
    """Each epoch in an order of its own, cut into batches."""
    size = round(sampling.num_samples * sampling.sample_rate)
    epoch, batch = divmod(step, sampling.num_samples // size)
    order = np.random.default_rng([sampling.key[0], epoch]).permutation(sampling.num_samples)
    return np.sort(order[batch * size : (batch + 1) * size])


def _of_one_size(sampling: PoissonSampling, step: int) -> np.ndarray:
    size = round(sampling.num_samples * sampling.sample_rate)
    return np.sort(np.random.default_rng([sampling.key[0], step]).choice(sampling.num_samples, size, replace=False))


def _normaliser_drawn(patch: MonkeyPatch, world: World) -> None:
    real = PrivateStep.__call__

    def call(step: PrivateStep, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        (mean,) = engine.mean_over_ranks([len(batch["row"])])
        step.plan = dataclasses.replace(step.plan, normaliser=max(1.0, mean * world.world_size))
        return real(step, engine, task, batch)

    patch.setattr(PrivateStep, "__call__", call)


def _noise_divided_twice(patch: MonkeyPatch, world: World) -> None:
    std = property(lambda plan: plan.noise_multiplier * plan.clip_norm / plan.normaliser)
    patch.setattr(PrivacyPlan, "noise_std", std)


def _charged_after_the_update(patch: MonkeyPatch, world: World) -> None:
    real, charge = PrivateStep.__call__, ledger.Ledger.charge

    def call(step: PrivateStep, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        number = engine.step
        metrics = real(step, engine, task, batch)
        if world.rank == 0:
            charge(step.ledger, number)
        return metrics

    patch.setattr(ledger.Ledger, "charge", lambda self, step: None)
    patch.setattr(PrivateStep, "__call__", call)


def _starts_share_a_number(patch: MonkeyPatch, world: World) -> None:
    patch.setattr(ledger, "next_start", lambda store: 0)


def _a_step_is_charged_once(patch: MonkeyPatch, world: World) -> None:
    real = ledger.mechanisms
    patch.setattr(ledger, "mechanisms", lambda records: real(list({r["step"]: r for r in records}.values())))


MUTATIONS: dict[str, tuple[Inject, list[str]]] = {
    # Noise.
    "noise over the root of 2 ranks": (_draw(lambda f, *a: f(*a) / math.sqrt(2)), ["self-test", "Gaussian"]),
    "noise over the root of 16 ranks": (_draw(lambda f, *a: f(*a) / 4), ["self-test", "audit"]),
    "noise of each rank on the whole sum": (_noise_of_each_rank_on_the_sum, ["self-test"]),
    "noise divided by the normaliser twice": (_noise_divided_twice, ["reference"]),
    "the noise of one step in all": (
        _draw(lambda f, words, step, *a: f(words, 0, *a)),
        ["self-test", "independence", "audit"],
    ),
    "the noise of the step before in every second": (
        _draw(lambda f, words, step, *a: f(words, step // 2, *a)),
        ["self-test", "independence"],
    ),
    "the noise of one start in all": (
        _draw(lambda f, words, step, start, *a: f(words, step, 0, *a)),
        ["self-test", "independence"],
    ),
    "the noise of one rank on all": (
        _draw(lambda f, words, step, start, i, *a: f(words, step, start, range(len(i)), *a)),
        ["self-test", "independence"],
    ),
    "noise that comes again after 1,000 elements": (_draw(_repeated), ["Gaussian"]),
    "noise of half of the key": (_draw(lambda f, words, *a: f((*words[:2], 0, 0), *a)), ["independence"]),
    "uniform noise": (_draw(_uniform), ["Gaussian"]),
    # Clipping, and the sum.
    "no clipping": (_no_clipping, ["self-test", "audit"]),
    "no clipping on one rank": (_no_clipping_on_rank_1, ["self-test"]),
    "one layer left unclipped": (_clipped(_last_layer_unclipped), ["self-test"]),
    "one layer left out of the norm by its rule": (_rule(nn.Conv2d, _outside_the_norm), ["trial"]),
    "each layer clipped by itself": (_clipped(_each_layer_by_itself), ["self-test"]),
    "each view clipped as an example": (_clipped(_each_view_an_example), ["self-test"]),
    "an example that is not finite is kept": (_what_is_not_finite_is_kept, ["self-test"]),
    "the norm of a bias token by token": (_rule(nn.Linear, _bias_norm_token_by_token), ["trial"]),
    "a Gram matrix of equal tokens alone": (_gram_of_equal_tokens, ["trial"]),
    "book-keeping leaves the clip factors out": (_factors_left_out, ["trial"]),
    "the sum of one rank": (_sum_of_one_rank, ["self-test"]),
    "the drawn batch as normaliser": (_normaliser_drawn, ["reference"]),
    # What DeepSpeed does.
    "an engine that ignores the gradient": (_the_engine_ignores_the_gradient, ["self-test"]),
    "an engine that clips the gradient": (_deepspeed_clips, ["self-test"]),
    # Sampling.
    "shuffling called Poisson": (_sampling(_shuffled), ["Poisson"]),
    "batches of one size called Poisson": (_sampling(_of_one_size), ["Poisson"]),
    "full batches called Poisson": (_sampling(lambda s, step: np.arange(s.num_samples)), ["Poisson", "audit"]),
    "one draw in all steps": (_sampling(lambda s, step, f=PoissonSampling.indices: f(s, 0)), ["Poisson"]),
    # What is charged.
    "charged after the update": (_charged_after_the_update, ["record"]),
    "two starts of one number": (_starts_share_a_number, ["ledger"]),
    "a step that is done again is charged once": (_a_step_is_charged_once, ["ledger"]),
}

SOUND = "nothing"
CASES = [
    *((SOUND, check) for check in CHECKS),
    *((fault, check) for fault, (_, failing) in MUTATIONS.items() for check in failing),
]


def say(world: World, uri: str, cases: list[tuple[str, str]]) -> list[str]:
    """What the checks say, one after another in the same processes, each with its fault; nothing where they pass."""
    said = []
    for number, (fault, check) in enumerate(cases):
        with MonkeyPatch.context() as patch:
            if fault != SOUND:
                MUTATIONS[fault][0](patch, world)
            try:
                CHECKS[check].run(world, f"{uri}/{number}")
                said.append("")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, ...]]:
    """What each rank says of each case."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for ranks in (1, 2):
        cases = [case for case in CASES if CHECKS[case[1]].ranks == ranks]
        said = run_ranks(say, ranks, str(tmp_path_factory.mktemp("mutations")), cases)
        found |= dict(zip(cases, zip(*said, strict=True), strict=True))
    return found


@pytest.mark.parametrize(("fault", "check"), CASES)
def test_the_check_fails_on_the_fault_alone(fault: str, check: str, verdicts: dict[Any, tuple[str, ...]]) -> None:
    for said in verdicts[fault, check]:
        if fault == SOUND:
            assert said == ""
        else:
            assert CHECKS[check].says in said
