"""PrivateStep on real ranks against a hand-written DP-SGD; its ledger against kill -9. (Broken mechanisms are in
`test_mutations`.)"""

import math
import signal
from typing import Any

import pytest
import torch

from rayproj.engine.engine import Precision
from rayproj.engine.world import World
from rayproj.privacy import accounting
from rayproj.privacy import step as step_module
from rayproj.privacy.noise import secure_gaussian
from tests.support import checks, private
from tests.support.ranks import run_ranks


@pytest.mark.parametrize(("world_size", "stages"), [(1, (0, 1, 3)), (2, (0, 1, 2, 3)), (3, (0, 2, 3))])
def test_any_layout_equals_dp_sgd_written_out(tmp_path, world_size: int, stages: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    run_ranks(checks.training_equals_dp_sgd_written_out, world_size, str(tmp_path), stages)


class InBf16(private.WithoutDropout):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return super().losses(lambda x: model(x.bfloat16()).float(), batch)  # type: ignore[arg-type]


def train_in_bf16(world: World, uri: str, stages: tuple[int, ...]) -> list[dict[str, Any]]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "WithoutDropout", InBf16)
        for stage in stages:
            config = private.settings(4, stage)
            config.engine.precision = Precision.bf16
            found.append(private.run(world, f"{uri}/{stage}", config, "a")["weights"])
    return found


def test_in_bf16_all_stages_and_ranks_are_alike_and_near_fp32(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, *others = [w for rank in run_ranks(train_in_bf16, 2, str(tmp_path), (0, 2, 3)) for w in rank]
    for name, tensor in private.written_out(4).items():
        assert first[name].dtype == torch.bfloat16
        torch.testing.assert_close(first[name].float(), tensor, rtol=0.02, atol=0.02)
        assert all(torch.equal(other[name], first[name]) for other in others)


def draw_other_noise_on_each_rank(world: World, uri: str) -> None:
    real = step_module.gaussian
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            step_module, "gaussian", lambda key, step, start, *a: real(key, step, start + 10 * world.rank, *a)
        )
        private.run(world, uri, private.settings(1, zero_stage=0), "a")


def test_at_zero_0_ranks_that_do_not_draw_the_same_noise_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match="is not the clipped noisy sum"):
        run_ranks(draw_other_noise_on_each_rank, 2, str(tmp_path))


def train_with_secure_noise(world: World, uri: str) -> dict[str, Any]:
    return private.run(world, uri, private.settings(4), "a", secure_noise=True)


def test_secure_noise_is_what_the_updates_get(tmp_path) -> None:  # type: ignore[no-untyped-def]
    expected = private.written_out(4, secure_gaussian)
    for result in run_ranks(train_with_secure_noise, 2, str(tmp_path)):
        for name, tensor in expected.items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-5, atol=1e-6)


def test_crashed_starts_are_charged_for_what_they_recorded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Commits are at steps 2 and 4. The first start dies before it records step 3, the second after: each time the next
    does steps 2 and 3 again, with the same examples and other noise."""
    config = private.settings(5, every_steps=2)
    config.checkpoint.asynchronous = False  # committed at step 2, however slow the machine
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
