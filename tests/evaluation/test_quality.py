"""Measures of quality against naive loops, closed forms and the formulas of the papers."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from rayproj.evaluation import quality as q
from rayproj.evaluation.frechet import FeatureStatistics, frechet_distance


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) * 0.7 + 0.4


@pytest.fixture(params=[7, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "BLOCK", request.param)


def test_distances_are_scipys(sets: tuple[np.ndarray, np.ndarray], block: None) -> None:
    x, y = sets
    np.testing.assert_allclose(np.concatenate(list(q.squared_distances(x, y))), cdist(x, y) ** 2, atol=1e-12)
    assert (np.diag(np.concatenate(list(q.squared_distances(x, x)))) == 0).all()


def test_precision_recall_density_coverage_by_a_naive_loop(sets: tuple[np.ndarray, np.ndarray], block: None) -> None:
    real, fake = sets
    k = 5

    def radius(of: np.ndarray, i: int) -> float:
        return sorted(math.dist(of[i], other) for j, other in enumerate(of) if j != i)[k - 1]

    in_real = [[math.dist(f, r) <= radius(real, i) for i, r in enumerate(real)] for f in fake]
    in_fake = [[math.dist(f, r) <= radius(fake, j) for j, f in enumerate(fake)] for r in real]
    expected = {
        "precision": np.mean([any(row) for row in in_real]),
        "recall": np.mean([any(row) for row in in_fake]),
        "density": np.sum(in_real) / (k * len(fake)),
        "coverage": np.mean([any(row[i] for row in in_real) for i in range(len(real))]),
    }
    assert q.prdc(real, fake, k) == pytest.approx(expected)
    assert 0 < expected["recall"] < 1


def test_a_set_is_all_of_itself(sets: tuple[np.ndarray, np.ndarray]) -> None:
    found = q.prdc(sets[0], sets[0])
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0
    assert found["density"] > 1, "each lies in its own ball and in those of which it is a neighbour"


def test_the_kernel_distance_by_a_naive_loop(
    sets: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = sets[0][:50], sets[1]
    kernel = lambda a, b: (a @ b / 4 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(50) for j in range(50) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    across = np.mean([kernel(a, b) for a in x for b in y])
    found, error = q.kernel_distance(x, y)
    assert found == pytest.approx(within - 2 * across) and error is None
    monkeypatch.setattr(q, "SUBSET", 20)
    by_subsets, error = q.kernel_distance(x, y)
    assert error is not None and abs(by_subsets - found) < 5 * error + 0.2


def test_unbiased_of_equal_distributions() -> None:
    rng = np.random.default_rng(3)
    values = [q.kernel_distance(*rng.normal(size=(2, 40, 3)))[0] for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_the_gaussian_mmd_by_a_naive_loop(sets: tuple[np.ndarray, np.ndarray], block: None) -> None:
    a, b = (x / np.linalg.norm(x, axis=1)[:, None] for x in sets)
    k = lambda u, v: np.mean([[math.exp(-(math.dist(p, r) ** 2) / 200) for r in v] for p in u])  # noqa: E731
    assert q.gaussian_mmd(*sets) == pytest.approx(1000 * (k(a, a) + k(b, b) - 2 * k(a, b)), abs=1e-9)


def test_the_limit_of_the_frechet_distance_is_without_its_bias() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6000, 16))
    y = y + 0.1
    estimate = frechet_distance(FeatureStatistics.of(x[:600]), FeatureStatistics.of(y[:600]))
    limit = q.frechet_limit(x, y)
    assert limit is not None
    assert abs(limit - 16 * 0.01) < 0.3 * abs(estimate - 16 * 0.01)
    assert q.frechet_limit(x[:31], y[:31]) is None


def test_copies_are_found_out() -> None:
    rng = np.random.default_rng(0)
    train, test, new = rng.normal(size=(3, 400, 8))
    honest = q.memorisation(train, test, new)
    copies = np.concatenate([new[:200], train[:200] + 0.01 * rng.normal(size=(200, 8))])
    found = q.memorisation(train, test, copies)
    assert abs(honest["copying"]) < 3 and honest["nearest"] == pytest.approx(1, abs=0.1)
    assert found["copying"] < -8 and found["authenticity"] < honest["authenticity"] - 0.15
    distance, of_test = ((cdist(z, train) ** 2).min(1) for z in (new, test))
    p = stats.mannwhitneyu(distance, of_test, use_continuity=False, method="asymptotic").pvalue
    assert 2 * stats.norm.sf(abs(honest["copying"])) == pytest.approx(p, rel=1e-6)
    between = (cdist(train, train) + np.diag(np.full(400, np.inf))).min(1)
    authentic = np.sqrt(distance) > between[cdist(new, train).argmin(1)]
    assert honest["authenticity"] == pytest.approx(authentic.mean())


def test_a_group_that_is_drawn_badly_is_the_worst_of_its_cells() -> None:
    rng, cells = np.random.default_rng(5), np.repeat(["a", "b", "c", "few"], [80, 90, 100, 10])
    means = {name: rng.normal(size=6) for name in "abc"} | {"few": np.zeros(6)}
    real, drawn = (np.stack([means[c] + rng.normal(size=6) for c in cells]) for _ in range(2))
    drawn[cells == "b"] *= 0.2  # all alike
    found = q.by_cell(real, cells.tolist(), drawn[::-1], cells[::-1].tolist())
    assert found["worst"] == "b" and found["left_out"] == ["few"] and list(found["cells"]) == ["a", "b", "c"]
    assert found["cells"]["b"]["recall"] < 0.5 * min(found["cells"][c]["recall"] for c in "ac")
    for name, one in found["cells"].items():
        x, y = real[cells == name], drawn[cells == name]
        assert one["images"] == len(y) and one["kernel_distance"] == pytest.approx(q.kernel_distance(x, y)[0], abs=1e-9)
        if name == "a":  # the smallest, of which all are compared
            assert one["coverage"] == q.prdc(x, y)["coverage"] and found["compared"] == len(x)
    # Fewer images of the same kind are not worse.
    few = np.concatenate([drawn[cells == "a"][:40], drawn[cells == "c"]])
    thinned = q.by_cell(real, cells.tolist(), few, ["a"] * 40 + ["c"] * 100)["cells"]
    assert abs(thinned["a"]["coverage"] - thinned["c"]["coverage"]) < 0.15
    assert q.by_cell(real, ["x"] * len(real), drawn, ["y"] * len(drawn)) == {
        "cells": {},
        "compared": 0,
        "left_out": ["x", "y"],
        "worst": None,
    }
