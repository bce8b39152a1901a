"""PrivateStep on real ranks against a hand-written DP-SGD; its self-test against broken mechanisms; its ledger against
kill -9."""

import signal

import pytest
import torch

from rayproj.privacy import accounting
from rayproj.privacy.noise import gaussian
from rayproj.privacy.sampling import PoissonSampling
from rayproj.storage.store import Store
from tests.support import private
from tests.support.ranks import run_ranks


def reference(steps: int) -> dict[str, torch.Tensor]:
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
        noise = plan.noise_multiplier * plan.clip_norm * gaussian(private.KEY, step, 0, range(total))
        flat, begin = (summed + noise) / 9, 0
        for p in parameters:
            p.grad = flat[begin : begin + p.numel()].view_as(p).clone()
            begin += p.numel()
        for group in optimizer.param_groups:
            group["lr"] = opt.lr * min(1.0, (step + 1) / opt.warmup_steps)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_any_layout_equals_dp_sgd_written_out(tmp_path, world_size: int, zero_stage: int) -> None:  # type: ignore[no-untyped-def]
    expected = reference(4)
    for rank in run_ranks(private.run, world_size, str(tmp_path), private.settings(4, zero_stage), "a"):
        for name, tensor in expected.items():
            torch.testing.assert_close(rank["weights"][name], tensor, rtol=1e-5, atol=1e-6)
        assert rank["epsilon"] == pytest.approx(private.mechanism(4).epsilon())


@pytest.mark.parametrize(
    "fault", ["noise too small", "sum of one rank only", "no clipping", "engine ignores the gradient"]
)
def test_a_broken_mechanism_never_trains(tmp_path, fault: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match="is not the clipped noisy sum"):
        run_ranks(private.run, 2, str(tmp_path), private.settings(2), "a", fault)
    assert Store(str(tmp_path)).list("ledger") == []


@pytest.mark.parametrize(("point", "charged"), [("ledger.before_record", 3), ("ledger.after_record", 4)])
def test_a_crashed_start_is_charged_for_what_it_recorded(tmp_path, point: str, charged: int) -> None:  # type: ignore[no-untyped-def]
    """Killed in its fourth step, with a commit at step 2: the next start does steps 2 and 3 again, with other noise."""
    config = private.settings(5, every_steps=2)
    died = run_ranks(private.run, 2, str(tmp_path), config, "first", env={"RAYPROJ_FAULT": f"{point}:0:4"}, check=False)
    assert died[0] == -signal.SIGKILL
    done = run_ranks(private.run, 2, str(tmp_path), config, "second")[0]
    first = [(step, 0) for step in range(charged)]
    assert sorted(done["releases"], key=lambda r: (r[1], r[0])) == [*first, (2, 1), (3, 1), (4, 1)]
    plan = private.mechanism(5)
    assert done["epsilon"] == accounting.epsilon(plan.sample_rate, plan.noise_multiplier, charged + 3, plan.delta)
    reported = [e["epsilon"] for e in done["events"] if e["type"] == "metrics"]
    assert reported[-1] == pytest.approx(done["epsilon"])
