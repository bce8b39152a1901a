"""Averages of other widths, put together from snapshots, against averages that were kept all along."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayproj.engine import ema
from rayproj.engine.checkpoint import commits, load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support import regression
from tests.support.ranks import run_ranks


def kept(values: np.ndarray, width: float) -> np.ndarray:
    """The average after each step, by its recurrence."""
    average, found = np.zeros_like(values[0]), []
    for step, value in enumerate(values, 1):
        average = value + ema.decay(step, width) * (average - value)
        found.append(average)
    return np.array(found)


def test_the_exponent_gives_the_width() -> None:
    """The standard deviation of the density τ^γ on [0, 1], by quadrature. Published: 6.94 for 0.1, 16.97 for 0.05."""
    for width in (0.02, 0.05, 0.1, 0.2):
        power = ema.exponent(width)
        x = (np.arange(200_000) + 0.5) / 200_000
        density = x**power / (x**power).sum()
        mean = (density * x).sum()
        assert np.sqrt((density * (x - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)
    assert ema.exponent(0.1) == pytest.approx(6.94, abs=0.005) and ema.exponent(0.05) == pytest.approx(16.97, abs=0.005)


def test_overlaps_are_the_integrals_of_the_profiles() -> None:
    x = (np.arange(400_000) + 0.5) / 400_000 * 100
    for a in ((60.0, 0.05), (100.0, 0.1)):
        for b in ((100.0, 0.05), (30.0, 0.2), (60.0, 0.05)):
            profiles = []
            for end, width in (a, b):
                power = ema.exponent(width)
                profiles.append(np.where(x <= end, (power + 1) / end * (x / end) ** power, 0.0))
            integral = (profiles[0] * profiles[1]).sum() * 100 / len(x)
            assert ema.overlap(a, b) == pytest.approx(integral, rel=1e-3)


@pytest.mark.parametrize("wanted", [0.05, 0.07, 0.1, 0.12, 0.15])
def test_an_average_of_any_width_is_that_which_was_kept(wanted: float) -> None:
    steps, every = 8192, 256
    values = np.cumsum(np.random.default_rng(0).normal(size=(steps, 50)), axis=0)  # as weights move in training
    tracks = {width: kept(values, width) for width in (0.05, 0.1)}
    ends = range(every, steps + 1, every)
    snapshots = [(float(end), width) for end in ends for width in tracks]
    weights, error = ema.combination(snapshots, (float(steps), wanted))
    together = sum(w * tracks[width][int(end) - 1] for w, (end, width) in zip(weights, snapshots, strict=True))
    expected = kept(values, wanted)[-1]
    assert np.linalg.norm(together - expected) < 1e-4 * np.linalg.norm(expected)
    assert weights.sum() == pytest.approx(1.0) and error < 5e-3


def test_too_few_snapshots_are_said() -> None:
    assert ema.combination([(1000.0, 0.05), (1000.0, 0.1)], (1000.0, 0.02))[1] > 0.2


def settings(zero_stage: int) -> regression.TrainConfig:
    config = regression.config(48, zero_stage, every_steps=4)
    config.engine.ema_widths = [0.05, 0.1]
    config.checkpoint.keep_every = 4
    return config


def train_and_watch(world: World, uri: str, zero_stage: int) -> list[torch.Tensor]:
    """The weights after each update, flat."""
    seen = []

    class Watch(regression.Recorder):
        engine = None

        def beat(self, step: int | None) -> None:
            if step and self.engine is not None:
                seen.append({n: t.clone() for n, t in regression.weights_of(self.engine).items()})

    link, made = Watch("a"), regression.Engine.__init__

    def remembered(engine, *args, **kwargs):  # type: ignore[no-untyped-def]
        made(engine, *args, **kwargs)
        link.engine = engine

    regression.Engine.__init__ = remembered  # type: ignore[method-assign]
    try:
        regression.run(world, f"{uri}/run", settings(zero_stage), "a", regression.Regression(0.0), link=link)
    finally:
        regression.Engine.__init__ = made  # type: ignore[method-assign]
    return seen  # type: ignore[return-value]


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_of_a_sharded_training(tmp_path: Path, zero_stage: int) -> None:
    weights = run_ranks(train_and_watch, 2, str(tmp_path), zero_stage)[0]
    assert len(weights) == 48
    store = Store(str(tmp_path / "run"))
    for width in (0.05, 0.1, 0.15):
        found, commit = load_ema(store, width)
        assert commit.step == 48
        for name in weights[0]:
            values = np.stack([w[name].flatten().double().numpy() for w in weights])
            expected = kept(values, width)[-1]
            # Of 12 snapshots, of which the early ones are of a few steps: a width that was kept is exact.
            near = 1e-5 if width < 0.12 else 2e-2
            assert np.linalg.norm(found[name].numpy() - expected) < near * np.linalg.norm(expected), (width, name)
    plain, _ = load_ema(store)
    assert any(not torch.equal(plain[name], found[name]) for name in plain)
    with pytest.raises(UserError, match=r"width 0.01 cannot be put together from 24 others"):
        load_ema(store, 0.01)


def go_on_with_another_width(world: World, uri: str) -> str:
    config = settings(2)
    regression.run(world, f"{uri}/run", regression.config(4), "a")
    config.steps = 8
    try:
        regression.run(world, f"{uri}/run", config, "b")
    except UserError as error:
        return str(error)
    return ""


def test_a_width_that_was_not_kept_from_the_start_is_refused(tmp_path: Path) -> None:
    said = run_ranks(go_on_with_another_width, 1, str(tmp_path))[0]
    assert "The checkpoint has no 'ema-0.05': the run began without it" in said
    store = Store(str(tmp_path / "run"))
    assert len(commits(store)) == 1
    with pytest.raises(UserError, match=r"has the average of train\.engine\.ema alone"):
        load_ema(store, 0.1)
