"""The engine against a plain torch loop: ZeRO, world size and micro-batches change the layout, not the numbers."""

import pytest
import torch

from rayproj.engine.engine import OptimizerConfig, Schedule, learning_rate
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


def train_without_dropout(world, uri, settings):  # type: ignore[no-untyped-def]
    return regression.run(world, uri, settings, "a", WithoutDropout())


def reference(settings) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # type: ignore[no-untyped-def]
    """The same training as one naive loop: full batch, torch's AdamW, an average per tensor."""
    task, batches = WithoutDropout(), regression.KeyedBatches(0, 1)
    model, opt = task.build(), settings.engine.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=opt.lr, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = opt.lr * min(1.0, (step + 1) / opt.warmup_steps)
        optimizer.zero_grad()
        task.losses(model, batches.at(step)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip_grad_norm)
        optimizer.step()
        decay = min(settings.engine.ema, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    return {name: p.detach() for name, p in model.named_parameters()}, average


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "micro_batch"),
    [(1, 1, 0), (2, 1, 3), (2, 2, 0), (3, 2, 2), (2, 3, 3), (3, 3, 0)],
)
def test_any_layout_equals_a_plain_loop(tmp_path, world_size, zero_stage, micro_batch) -> None:  # type: ignore[no-untyped-def]
    settings = regression.config(6, zero_stage, micro_batch)
    weights, average = reference(settings)
    found = run_ranks(train_without_dropout, world_size, str(tmp_path), settings)
    for rank in found:
        for name, expected in weights.items():
            torch.testing.assert_close(rank["weights"][name], expected, rtol=1e-5, atol=1e-6)
        for name, expected in average.items():
            torch.testing.assert_close(rank["ema"][name], expected.flatten(), rtol=1e-5, atol=1e-6)


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
