"""Comparisons prompt by prompt, and measures against people."""

import numpy as np
import pytest
from scipy import stats

from rayproj.judging.paired import agreement, compared, human_order, mean_interval, orders


def test_a_comparison_is_wilcoxons() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    first[3] = np.nan  # a prompt of which the measure says nothing
    found = compared(first, second)
    there = np.isfinite(first)
    assert found["n"] == 79 and found["p"] == pytest.approx(stats.wilcoxon(first[there], second[there]).pvalue)
    assert found["difference"] == pytest.approx((first - second)[there].mean())
    assert found["low"] < found["difference"] < found["high"]


def test_equal_scores_have_no_order() -> None:
    assert compared(np.ones(9), np.ones(9))["p"] == 1.0 and compared(np.ones(9), np.ones(9))["order"] == 0


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = [f["low"] <= 0 <= f["high"] for f in (mean_interval(rng.normal(0, 1, 60), k) for k in range(200))]
    assert 0.89 <= np.mean(held) <= 0.99
    assert mean_interval(np.full(4, np.nan)) == {"n": 0, "mean": None, "low": None, "high": None}


@pytest.mark.parametrize("wins, losses, order", [(70, 30, 1), (30, 70, -1), (52, 48, 0), (0, 0, 0)])
def test_people_are_sure_or_not(wins: int, losses: int, order: int) -> None:
    assert human_order(wins, losses) == order


def test_measures_are_held_against_people() -> None:
    rng = np.random.default_rng(2)
    quality = {"a": 0.9, "b": 0.6, "c": 0.6, "d": 0.1}
    good = orders({name: q + rng.normal(0, 0.1, 60) for name, q in quality.items()})
    bad = {pair: -order for pair, order in good.items()}
    people = {("a", "b"): 1, ("a", "c"): 1, ("a", "d"): 1, ("b", "c"): 0, ("b", "d"): 1, ("c", "d"): 1}
    found = agreement({"good": good, "bad": bad}, people)
    assert found["measures"]["good"] | {"low": 0, "high": 0} == {
        "agree": 6,
        "pairs": 6,
        "share": 1.0,
        "low": 0,
        "high": 0,
    }
    assert found["measures"]["bad"]["agree"] == 1  # the pair that neither can tell
    assert found["both"]["good, bad"]["same"] == pytest.approx(1 / 6) and found["both"]["good, bad"]["share"] == 1.0


def test_the_reports_shares_are_those_of_its_counts() -> None:
    """Imagen 3's section 4.1: CLIP has the order of people in 13 of 30 pairs, 43.3 %, VQAScore in 24, Gecko in 22."""
    pairs = [(f"m{k}", f"n{k}") for k in range(30)]
    people = dict.fromkeys(pairs, 1)
    right = {"CLIP": 13, "VQAScore": 24, "Gecko": 22}
    orders = {name: {pair: 1 if k < n else -1 for k, pair in enumerate(pairs)} for name, n in right.items()}
    found = agreement(orders, people)["measures"]
    assert {n: round(100 * of["share"], 1) for n, of in found.items()} == {
        "CLIP": 43.3,
        "VQAScore": 80.0,
        "Gecko": 73.3,
    }
