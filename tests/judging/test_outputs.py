"""Distributions over planted attributes against closed forms."""

import numpy as np
import pytest

from rayproj.judging.outputs import distribution, homogeneous, outputs


def test_independent_draws_are_as_homogeneous_as_chance() -> None:
    """P(all of m alike) = Σ p^m."""
    rng, p, m = np.random.default_rng(0), np.array([0.7, 0.2, 0.1]), 4
    kind = rng.choice(3, (20000, m), p=p)
    found = homogeneous(kind.ravel(), np.repeat(np.arange(20000), m))
    exact = (p**m).sum()
    assert found["low"] <= exact <= found["high"] and found["independent"] == pytest.approx(exact, abs=0.01)


def test_a_prompt_that_decides_is_seen() -> None:
    kind, prompt = np.repeat([0, 1, 0, 1], 5), np.repeat(["a", "b", "c", "d"], 5)
    found = homogeneous(kind, prompt)
    assert found["share"] == 1.0 and found["prompts"] == 4 and found["independent"] == pytest.approx(2 * 0.5**5)


def test_prompts_of_one_image_say_nothing() -> None:
    found = homogeneous(np.array([0, 1, 1]), np.array(["a", "b", "b"]))
    assert (found["prompts"], found["homogeneous"]) == (1, 1)


def test_shares_are_counted() -> None:
    found = outputs(np.array([0, 0, 2, 2, 2]), np.array(["a"] * 5), ["x", "y", "z"])
    assert {name: d["share"] for name, d in found["distribution"].items()} == {"x": 0.4, "y": 0.0, "z": 0.6}
    assert found["distribution"] == distribution(np.array([0, 0, 2, 2, 2]), ["x", "y", "z"])
