"""Comparisons prompt by prompt, and measures against people."""

import numpy as np
import pytest
from scipy import stats

from rayproj.judging.paired import agreement, compared, human_order, mean_interval, orders
from tests.support import imagen3


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


def test_measures_agree_with_people_as_often_as_imagen_3s_report_counts() -> None:
    """Its figure 11, pair by pair, gives its table 6: VQAScore has the order of people in 11 and 13 of 15 pairs, Gecko in
    10 and 12; and nearly what it says of the pairs on which the two agree (72 %, of which 94.4 % right)."""
    sets = list(imagen3.ORDERS)
    for prompts, counts in zip(sets, ({"Gecko": 12, "VQAScore": 13}, {"Gecko": 10, "VQAScore": 11}), strict=True):
        measures = {name: imagen3.orders(prompts, name) for name in counts}
        found = agreement(measures, imagen3.orders(prompts, "people"))["measures"]
        assert {name: of["agree"] for name, of in found.items()} == counts
    each = {
        judge: {(s, *p): order for s in sets for p, order in imagen3.orders(s, judge).items()}
        for judge in ("Gecko", "VQAScore", "people")
    }
    people = each.pop("people")
    found = agreement(each, people)  # type: ignore[arg-type]
    assert {n: round(100 * of["share"], 1) for n, of in found["measures"].items()} == {"VQAScore": 80.0, "Gecko": 73.3}
    both = found["both"]["Gecko, VQAScore"]
    assert (both["same"], both["share"]) == pytest.approx((21 / 30, 20 / 21))
    assert abs(both["same"] - 0.72) < 0.025 and abs(both["share"] - 0.944) < 0.01


def test_people_are_sure_of_the_pairs_of_which_the_report_says_so() -> None:
    """Its shares of 2,500 ratings against its own signs (figure 11): 28 of 30. The other two are 52.1 and 52.3 %, which it
    calls equal, and of another 52.3 % it does not."""
    unlike = set()
    for prompts in imagen3.ORDERS:
        figure, printed = imagen3.FULL[f"alignment, {prompts}"], imagen3.orders(prompts, "people")
        names, wins = figure.names(), figure.wins().round().astype(int)
        for a, b in printed:
            i, j = names.index(a), names.index(b)
            if human_order(int(wins[i, j]), int(wins[j, i])) != printed[a, b]:
                unlike.add((prompts, a, b))
    assert unlike == {("DALL·E 3 Eval", "Imagen-3", "SD-3"), ("DALL·E 3 Eval", "SD-3", "MJ-v6")}
