"""The work in an example, against the closed form of each layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayproj.engine.engine import Engine, EngineConfig
from rayproj.engine.flops import flops_per_sample, peak_tflops
from rayproj.engine.world import World
from tests.support.ranks import run_ranks

CONV = 2 * (5 * 5) * (8 * (6 // 2)) * 3 * 3  # of stride 2 on 10 x 10, in 2 groups: multiply and add
LINEAR = 2 * (8 * 5 * 5) * 7
HEAD = 2 * 7 * 1


class Vision:
    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5)),
            *(nn.Linear(8 * 5 * 5, 7), nn.ReLU(), nn.Linear(7, 1)),
        )

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean(1)


def measure(world: World, zero_stage: int) -> dict[str, Any]:
    task = Vision()
    engine = Engine(task.build(), EngineConfig(zero_stage=zero_stage), 1, world)
    engine.module[3].eval()  # one that a task keeps in eval mode
    batch = {"x": torch.randn(4, 6, 10, 10), "row": torch.zeros(4, 3, dtype=torch.int64)}
    before, state = engine.snapshot(), torch.get_rng_state()
    counts = [flops_per_sample(engine, task, {name: t[:n] for name, t in batch.items()}) for n in (4, 1)]
    after = engine.snapshot()
    return {
        "counts": counts,
        "same": torch.equal(state, torch.get_rng_state())
        and all(torch.equal(t, after.fixed[name]) for name, t in before.fixed.items())
        and all(torch.equal(t, after.sharded["master"][name]) for name, t in before.sharded["master"].items()),
        "buffers": set(before.fixed),
        "gradients": any(p.grad is not None for p in engine.module.parameters()),
        "training": [module.training for module in engine.module],
    }


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 2), (2, 3)])
def test_an_example_is_three_forwards_of_its_products_and_leaves_no_trace(world_size: int, zero_stage: int) -> None:
    for rank, found in enumerate(run_ranks(measure, world_size, zero_stage)):
        assert found["counts"] == [3 * (CONV + LINEAR + HEAD)] * 2
        assert found["same"] and not found["gradients"]
        assert found["training"] == [True, True, True, False, True, True, True]
        assert rank > 0 or found["buffers"] == {
            f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
        }


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_tflops("cpu") == 0.0
