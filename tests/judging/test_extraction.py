"""Planted copies are found, and nothing else is."""

import numpy as np
import pytest

from rayproj.judging.extraction import NEIGHBOURS, adaptive_distance, attempts


def test_the_distance_is_that_of_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    x, train = rng.normal(size=(7, 5)), rng.normal(size=(80, 5))
    ratio, place = adaptive_distance(x, train)
    for row, r, p in zip(x, ratio, place, strict=True):
        distance = sorted(float(np.linalg.norm(row - other)) for other in train)
        assert r == pytest.approx(distance[0] / np.mean(distance[:NEIGHBOURS]))
        assert np.linalg.norm(row - train[p]) == pytest.approx(distance[0])


def test_planted_copies_are_extracted() -> None:
    rng = np.random.default_rng(1)
    train = rng.uniform(0, 255, (300, 64))
    drawn = rng.uniform(0, 255, (40, 64))
    drawn[:4] = train[:4] + rng.normal(0, 4, (4, 64))
    drawn[4] = train[9]  # a copy, of another than was asked for
    ratio, place = adaptive_distance(drawn, train)
    captions = np.array([f"caption {k}" for k in range(300)])
    prompt = np.array([f"caption {k // 2}" for k in range(40)])
    prompt[:5] = ["caption 0", "caption 1", "caption 2", "caption 3", "caption 4"]
    found = attempts(prompt, ratio, captions[place] == prompt)
    assert found["images"]["count"] == 5
    assert found["extracted"] == ["caption 0", "caption 1", "caption 2", "caption 3"]
    assert found["prompts"]["low"] < found["prompts"]["share"] < found["prompts"]["high"]
