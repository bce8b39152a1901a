"""PrivateStep on real ranks against a hand-written DP-SGD; its self-test against broken mechanisms; its ledger against
kill -9."""

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayproj.engine.world import World
from rayproj.privacy import accounting, clipping
from rayproj.privacy import step as step_module
from rayproj.privacy.noise import gaussian, secure_gaussian
from rayproj.privacy.sampling import PoissonSampling
from rayproj.storage.store import Store
from tests.support import private
from tests.support.ranks import run_ranks


def reference(steps: int, draw: Callable[..., torch.Tensor] = gaussian) -> dict[str, torch.Tensor]:
    """DP-SGD written out: example by example, view by view, torch's AdamW."""
    task, plan, config = private.WithoutDropout(), private.mechanism(steps), private.settings(steps)
    model, opt = task.build(), config.engine.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=opt.lr, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay
    )
    batches = private.PoissonBatches(PoissonSampling(plan.num_samples, plan.sample_rate, private.KEY), 0, 1)
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
        noise = plan.noise_multiplier * plan.clip_norm * draw(private.KEY, step, 0, range(total))
        flat, begin = (summed + noise) / 9, 0
        for p in parameters:
            p.grad = flat[begin : begin + p.numel()].view_as(p).clone()
            begin += p.numel()
        for group in optimizer.param_groups:
            group["lr"] = opt.lr * min(1.0, (step + 1) / opt.warmup_steps)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def train_at(world: World, uri: str, stages: tuple[int, ...]) -> list[dict[str, Any]]:
    return [private.run(world, f"{uri}/{stage}", private.settings(4, stage), "a") for stage in stages]


@pytest.mark.parametrize(("world_size", "stages"), [(1, (1, 3)), (2, (1, 2, 3)), (3, (2, 3))])
def test_any_layout_equals_dp_sgd_written_out(tmp_path, world_size: int, stages: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    expected = reference(4)
    for results in run_ranks(train_at, world_size, str(tmp_path), stages):
        for result in results:
            for name, tensor in expected.items():
                torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-5, atol=1e-6)
            assert result["epsilon"] == pytest.approx(private.mechanism(4).epsilon())


def train_with_secure_noise(world: World, uri: str) -> dict[str, Any]:
    return private.run(world, uri, private.settings(4), "a", secure_noise=True)


def test_secure_noise_is_what_the_updates_get(tmp_path) -> None:  # type: ignore[no-untyped-def]
    expected = reference(4, secure_gaussian)
    for result in run_ranks(train_with_secure_noise, 2, str(tmp_path)):
        for name, tensor in expected.items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-5, atol=1e-6)


def _bias_outside_the_norm(*args: Any) -> Any:
    """Clips all parameters but the last, which is summed as it is."""
    model, losses, parameters, batch, multiplicity, clip_norm, chunk = args
    rest, *others = clipping.clipped_sum(model, losses, parameters[:-1], batch, multiplicity, clip_norm, chunk)
    last, _, _ = clipping.clipped_sum(model, losses, parameters[-1:], batch, multiplicity, 1e9, chunk)
    return torch.cat([rest, last]), *others


FAULTS = (
    "noise too small",
    "sum of one rank only",
    "no clipping",
    "engine ignores the gradient",
    "a bias outside the norm",
    "no clipping on rank 1 alone",
)


def refusals(world: World, uri: str) -> dict[str, str]:
    """What training says to each broken mechanism, one after another in the same processes."""
    sound = (step_module.gaussian, step_module.reduce_to_share, step_module.clipped_sum, clipping.clip_factor)
    said = {}
    for fault in FAULTS:
        if fault == "a bias outside the norm":
            step_module.clipped_sum = _bias_outside_the_norm
        elif fault == "no clipping on rank 1 alone" and world.rank == 1:
            clipping.clip_factor = lambda norm, c: torch.ones_like(norm)
        try:
            private.run(world, uri, private.settings(1), "a", fault)
            said[fault] = "trained"
        except RuntimeError as error:
            said[fault] = str(error)
        step_module.gaussian, step_module.reduce_to_share, step_module.clipped_sum, clipping.clip_factor = sound
    return said


def test_a_broken_mechanism_never_trains(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for said in run_ranks(refusals, 2, str(tmp_path)):
        assert {fault: "is not the clipped noisy sum" in text for fault, text in said.items()} == dict.fromkeys(
            FAULTS, True
        )
    assert Store(str(tmp_path)).list("ledger") == []


def test_crashed_starts_are_charged_for_what_they_recorded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Commits are at steps 2 and 4. The first start dies before it records step 3, the second after: each time the next
    does steps 2 and 3 again, with the same examples and other noise."""
    config = private.settings(5, every_steps=2)
    for attempt, point in (("first", "ledger.before_record:0:4"), ("second", "ledger.after_record:0:2")):
        died = run_ranks(private.run, 2, str(tmp_path), config, attempt, env={"RAYPROJ_FAULT": point}, check=False)
        assert died[0] == -signal.SIGKILL
    done = run_ranks(private.run, 2, str(tmp_path), config, "third")[0]
    assert sorted(done["releases"], key=lambda r: (r[1], r[0])) == [
        *((0, 0), (1, 0), (2, 0)),
        *((2, 1), (3, 1)),
        *((2, 2), (3, 2), (4, 2)),
    ]
    plan = private.mechanism(5)
    q, sigma = plan.sample_rate, plan.noise_multiplier
    drawn_once_each = accounting.epsilon_of(
        [(q, sigma, 3), (q, sigma / math.sqrt(3), 1), (q, sigma / math.sqrt(2), 1)], plan.delta
    )
    assert done["epsilon"] == pytest.approx(drawn_once_each)
    assert done["epsilon"] > accounting.epsilon(q, sigma, 8, plan.delta) > plan.epsilon()
    first = run_ranks(private.run, 1, str(tmp_path / "other"), private.settings(4), "only")[0]
    logged = {e["step"]: e["epsilon"] for e in first["events"] if e["type"] == "metrics"}
    assert logged == pytest.approx({steps: plan.epsilon(steps) for steps in (2, 4)}), "the last ε, not the mean"
    reported = [e["epsilon"] for e in done["events"] if e["type"] == "metrics"]
    assert reported[-1] == pytest.approx(done["epsilon"])
