"""Goodput, against a run that is played step by step."""

import random
import time
from pathlib import Path

import pytest

from rayproj.storage.store import Store
from rayproj.tracking.goodput import Goodput
from rayproj.tracking.tracker import Tracker, TrackingConfig, WandbMode


def test_goodput_is_the_seconds_of_steps_over_the_seconds_worked() -> None:
    rows = [{"step": 10, "step_seconds": 2.0}, {"step": 30, "step_seconds": 1.0}, {"step": 35, "step_seconds": 4.0}]
    assert Goodput(rows).share(100.0) == {"goodput": pytest.approx((10 * 2 + 20 * 1 + 5 * 4) / 100)}


def test_what_has_no_time_has_no_goodput_and_none_is_above_one() -> None:
    assert Goodput().share(100.0) == {}
    assert Goodput([{"step": 1, "loss": 1.0}]).share(100.0) == {}
    assert Goodput([{"step": 10, "step_seconds": 2.0}]).share(19.0) == {"goodput": 1.0}
    assert Goodput([{"step": 10, "step_seconds": 2.0}]).share(0.0) == {"goodput": 1.0}


def test_rows_without_a_time_are_passed_over() -> None:
    rows = [{"step": 4, "step_seconds": 1.0}, {"step": 9}, {"step": 10, "step_seconds": 1.0}]
    assert Goodput(rows).share(10.0) == {"goodput": pytest.approx(0.5)}


def test_steps_that_are_done_twice_count_once(tmp_path: Path) -> None:
    """A run that dies at random and goes on from its last commit; a step that survives counts when it is done again."""
    draw = random.Random(0)
    worked, step, took = 0.0, 0, {}
    tracker = Tracker("run", "train", Store(str(tmp_path)), TrackingConfig(wandb=WandbMode.disabled), {})
    tracker.start()
    for _ in range(6):
        worked += 5.0  # to start
        tracker.event({"type": "resumed", "step": step, "ranks": 1})
        for _ in range(draw.randint(1, 6)):
            seconds = draw.uniform(0.5, 2.0)
            for number in range(step + 1, step + 5):
                took[number], worked = seconds, worked + seconds
            step += 4
            tracker.event({"type": "metrics", "step": step, "step_seconds": seconds})
        step = max(0, step - 4 * draw.randint(0, 2))  # the last commit, at a row
    tracker.event({"type": "resumed", "step": step, "ranks": 1})
    useful = sum(seconds for number, seconds in took.items() if number <= step)
    tracker.worked_before = worked
    began = time.time()
    share = tracker.totals()["goodput"]
    tracker.close()
    assert 0 < useful < worked
    assert share == pytest.approx(useful / (worked + began - tracker._began), rel=1e-3)
