"""Where the time goes: against sleeps, and against a rank that keeps its peer waiting."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayproj.engine.engine import Engine
from rayproj.engine.steps import PlainStep
from rayproj.engine.timing import PHASES, StepTimer
from rayproj.engine.world import World
from tests.support import regression
from tests.support.ranks import run_ranks


def test_nested_phases_count_each_second_once_for_the_innermost() -> None:
    timer, began = StepTimer("cpu"), time.perf_counter()
    time.sleep(0.05)
    with timer.phase("optimizer"):
        time.sleep(0.1)
        with timer.phase("communication"):
            time.sleep(0.2)
            with timer.phase("communication"):
                time.sleep(0.1)
        time.sleep(0.05)
    with timer.phase("data_wait"):
        time.sleep(0.15)
    found, wall = timer.read(), time.perf_counter() - began
    expected = {"compute": 0.05, "optimizer": 0.15, "communication": 0.3, "data_wait": 0.15, "checkpoint_stall": 0.0}
    assert set(found) == set(PHASES)
    for name, seconds in expected.items():
        assert found[name] >= seconds - 1e-3, name
    assert sum(found.values()) == pytest.approx(wall, abs=0.02), "and none of them twice"


def test_reading_begins_anew_even_within_a_phase() -> None:
    timer = StepTimer("cpu")
    with timer.phase("data_wait"):
        time.sleep(0.3)
        assert timer.read()["data_wait"] >= 0.299
        time.sleep(0.05)
    assert 0.049 <= timer.read()["data_wait"] < 0.25
    assert sum(timer.read().values()) < 0.04


def test_a_phase_that_raises_is_over() -> None:
    timer = StepTimer("cpu")
    with pytest.raises(KeyError), timer.phase("optimizer"):
        raise KeyError
    time.sleep(0.2)
    found = timer.read()
    assert found["compute"] >= 0.199 and found["optimizer"] < 0.1


PAUSE = 0.4
STAGES = (0, 1, 2, 3)


class Unequal(regression.Regression):
    """Rank 1 takes longer for its forward."""

    def __init__(self, rank: int) -> None:
        super().__init__(dropout=0.0)
        self.rank = rank

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(PAUSE * self.rank)
        return super().losses(model, batch)


def times_of_a_step(world: World) -> dict[int | str, dict[str, float]]:
    found: dict[int | str, dict[str, float]] = {}
    for zero_stage in STAGES:
        task, step = Unequal(world.rank), PlainStep(12, 0, world.world_size)
        engine = Engine(task.build(), regression.config(2, zero_stage).engine, 2, world)
        batches = regression.KeyedBatches(world.rank, world.world_size)
        step(engine, task, batches.at(0))
        engine.mean_over_ranks([0.0])
        engine.timer.read()
        step(engine, task, batches.at(1))
        found[zero_stage] = engine.timer.read()
        if world.rank == 1:
            time.sleep(PAUSE)
        engine.mean_over_ranks([0.0])
        found[f"{zero_stage}, the end"] = engine.timer.read()
    torch.distributed.barrier()
    return found


def test_waiting_for_a_peer_in_any_stages_collectives_is_communication() -> None:
    fast, slow = run_ranks(times_of_a_step, 2)
    for zero_stage in STAGES:
        assert fast[zero_stage]["communication"] >= 0.8 * PAUSE, (zero_stage, fast[zero_stage])
        assert fast[zero_stage]["compute"] < 0.6 * PAUSE
        assert slow[zero_stage]["compute"] >= PAUSE and slow[zero_stage]["communication"] < 0.6 * PAUSE
        assert fast[f"{zero_stage}, the end"]["communication"] >= 0.8 * PAUSE, "the one message of a step"
