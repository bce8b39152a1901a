"""The engine against a plain torch loop: ZeRO, world size and micro-batches change the layout, not the numbers."""

import sys
from typing import Any

import pytest
import torch

from rayproj.engine.engine import OptimizerConfig, Precision, Schedule, learning_rate
from rayproj.engine.steps import PlainStep
from rayproj.errors import UserError
from tests.support import regression
from tests.support.ranks import run_ranks


class WithoutDropout(regression.Regression):
    def build(self) -> torch.nn.Module:
        model = super().build()
        assert isinstance(model, torch.nn.Sequential)
        model[2] = torch.nn.Identity()
        return model

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        return super().losses(lambda x: model(x.to(dtype)).float(), batch)  # type: ignore[arg-type]


def train_without_dropout(world, uri, settings):  # type: ignore[no-untyped-def]
    return regression.run(world, uri, settings, "a", WithoutDropout())


def reference(  # type: ignore[no-untyped-def]
    settings, dtype: torch.dtype = torch.float32, ranks: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same training as one naive loop: torch's AdamW on fp32 weights, an average per tensor. The model and the
    gradients, each rank's own and their mean, are of the given type."""
    task = WithoutDropout()
    model, opt = task.build().to(dtype), settings.engine.optimizer
    master = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        master.values(), lr=opt.lr, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay
    )
    average = {name: p.detach().clone() for name, p in master.items()}
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = opt.lr * min(1.0, (step + 1) / opt.warmup_steps)
        mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for rank in range(ranks):
            model.zero_grad()
            task.losses(model, regression.KeyedBatches(rank, ranks).at(step)).mean().backward()
            for name, p in model.named_parameters():
                mean[name] += p.grad / ranks  # type: ignore[operator]
        for name, p in master.items():
            p.grad = mean[name].float()
        torch.nn.utils.clip_grad_norm_(master.values(), opt.clip_grad_norm)
        optimizer.step()
        model.load_state_dict(master)
        decay = min(settings.engine.ema, (2 + step) / (11 + step))
        for name, p in master.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    return {name: p.detach() for name, p in model.named_parameters()}, average


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "micro_batch"),
    [(2, 0, 3), (3, 0, 0), (1, 1, 0), (2, 1, 3), (2, 2, 0), (3, 2, 2), (2, 3, 3), (3, 3, 0)],
)
def test_any_layout_equals_a_plain_loop(tmp_path, world_size, zero_stage, micro_batch) -> None:  # type: ignore[no-untyped-def]
    settings = regression.config(6, zero_stage, micro_batch)
    weights, average = reference(settings)
    found = run_ranks(train_without_dropout, world_size, str(tmp_path), settings)
    for rank in found:
        for name, expected in weights.items():
            torch.testing.assert_close(rank["weights"][name], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(rank["weights"][name], found[0]["weights"][name]), "on every rank the same"
        for name, expected in average.items():
            torch.testing.assert_close(rank["ema"][name], expected.flatten(), rtol=1e-5, atol=1e-6)


def train_in_bf16(world, uri, settings):  # type: ignore[no-untyped-def]
    found = {}
    for settings.engine.zero_stage in (0, 1, 2, 3):
        found[settings.engine.zero_stage] = train_without_dropout(
            world, f"{uri}/{settings.engine.zero_stage}", settings
        )
    return found


def test_in_bf16_every_stage_equals_a_plain_loop_with_fp32_master_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = regression.config(6)
    settings.engine.precision = Precision.bf16
    weights, average = reference(settings, torch.bfloat16, ranks=2)
    for rank in run_ranks(train_in_bf16, 2, str(tmp_path), settings):
        for found in rank.values():
            for name, expected in weights.items():
                assert found["weights"][name].dtype == torch.bfloat16
                torch.testing.assert_close(found["weights"][name], expected)
            for name, expected in average.items():  # of the master weights
                torch.testing.assert_close(found["ema"][name], expected.flatten(), rtol=1e-4, atol=1e-5)


def loads_inductor(world, uri, settings):  # type: ignore[no-untyped-def]
    regression.run(world, uri, settings, "a")
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_rank_that_compiles_nothing_does_not_load_inductor(tmp_path, zero_stage: int) -> None:  # type: ignore[no-untyped-def]
    """DeepSpeed would, for its Muon: 0.7 s of 3.5 that a rank takes to start."""
    assert run_ranks(loads_inductor, 1, str(tmp_path), regression.config(2, zero_stage)) == [False]


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule=Schedule.cosine)
    assert learning_rate(config, 0, 100) == pytest.approx(0.5, rel=1e-3)
    assert learning_rate(config, 50, 100) == pytest.approx(1.0)
    assert learning_rate(config, 100, 100) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(OptimizerConfig(lr=2.0), 77, 100) == 2.0


def test_a_batch_that_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(
        UserError, match=r"batch=10 does not divide over 4 ranks; set cluster.ranks to one of \[1, 2, 5"
    ):
        PlainStep(10, 0, 4)
    says = r"does not divide over 2 ranks in micro-batches of 2; set cluster.ranks to one of \[1, 5\]"
    with pytest.raises(UserError, match=says):
        PlainStep(10, 2, 2)
    assert PlainStep(12, 2, 3).micro_batches == 2
