"""Measures by group, against loops, scikit-learn and planted gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from rayproj.evaluation.fairness import (
    Judged,
    adjusted,
    balanced_accuracy,
    calibration_error,
    equalized_odds,
    fairness,
    macro_auc,
    paired_over_seeds,
    replicates,
    sensitivity,
)


def judged(
    n: int = 600, classes: int = 3, wrong: float = 0.3, seed: int = 0, hard: str = "b"
) -> tuple[Judged, list[str]]:
    """A classifier that is wrong twice as often on the group `hard`."""
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, classes, n), rng.choice(list("abc"), n)
    rate = np.where(groups == hard, min(1.0, 2 * wrong), wrong)
    said = np.where(rng.random(n) < rate, rng.integers(0, classes, n), labels)
    logits = rng.normal(size=(n, classes)) + 3 * np.eye(classes)[said]
    p = np.exp(logits)
    return Judged(labels, p / p.sum(1, keepdims=True), (0, 2)), groups.tolist()


def test_measures_are_scikit_learns() -> None:
    one, _ = judged()
    assert balanced_accuracy(one.labels, one.predictions) == pytest.approx(
        metrics.balanced_accuracy_score(one.labels, one.predictions)
    )
    expected = metrics.roc_auc_score(one.labels, one.probabilities, multi_class="ovr", average="macro")
    assert macro_auc(one.labels, one.probabilities) == pytest.approx(expected)
    two, _ = judged(classes=2)
    assert macro_auc(two.labels, two.probabilities) == pytest.approx(
        metrics.roc_auc_score(two.labels, two.probabilities[:, 1])
    )
    assert math.isnan(macro_auc(np.zeros(5, int), np.full((5, 3), 1 / 3)))


def test_sensitivity_and_calibration_written_out() -> None:
    one, _ = judged()
    risky = [i for i in range(600) if one.labels[i] in (0, 2)]
    assert sensitivity(one.labels, one.predictions, (0, 2)) == np.mean([one.predictions[i] in (0, 2) for i in risky])
    error = 0.0
    for k in range(15):
        top = one.probabilities.max(1)
        inside = (top >= k / 15) & ((top < (k + 1) / 15) | (k == 14))
        if inside.any():
            right = (one.predictions[inside] == one.labels[inside]).mean()
            error += inside.mean() * abs(right - top[inside].mean())
    assert calibration_error(one.labels, one.probabilities) == pytest.approx(error)


def test_equalized_odds_written_out() -> None:
    one, groups = judged()
    found = 0.0
    for c in range(3):
        for truth in (True, False):
            rates = []
            for g in "abc":
                inside = (np.array(groups) == g) & ((one.labels == c) == truth)
                rates.append((one.predictions[inside] == c).mean())
            found = max(found, max(rates) - min(rates))
    assert equalized_odds(one.labels, one.predictions, np.array(groups)) == pytest.approx(found)


def test_groups_without_examples_have_no_say_in_equalized_odds() -> None:
    """Group a has no example of class 0, group b nothing but class 1, and class 2 is in group c alone."""
    rng = np.random.default_rng(0)
    groups = np.repeat(list("abcd"), 60)
    labels = rng.integers(0, 3, 240)
    labels[:60], labels[60:120], labels[180:] = 1 + (np.arange(60) % 2), 1, np.arange(60) % 2
    labels[:60] = np.where(labels[:60] == 2, 1, labels[:60])
    for wrong in (0.0, 0.3):
        predictions = np.where(rng.random(240) < wrong, rng.integers(0, 3, 240), labels)
        found = []
        for c in range(3):
            for truth in (True, False):
                rates = []
                for g in "abcd":
                    inside = [i for i in range(240) if groups[i] == g and (labels[i] == c) == truth]
                    if inside:
                        rates.append(sum(predictions[i] == c for i in inside) / len(inside))
                if len(rates) >= 2:
                    found.append(max(rates) - min(rates))
        assert equalized_odds(labels, predictions, groups) == pytest.approx(max(found))
    assert equalized_odds(labels, labels, groups) == 0, "who is always right treats all alike"
    assert math.isnan(equalized_odds(np.array([0, 1]), np.array([0, 0]), np.array(["a", "b"])))


def test_the_interval_of_equalized_odds_is_a_bootstrap_of_examples() -> None:
    one, groups = judged()
    found = fairness(one, groups, bootstraps=200)
    low, high = found["equalized_odds_interval"]
    assert low < found["equalized_odds"] < high
    rng, drawn = np.random.default_rng(9), list[float]()
    for _ in range(300):
        rows = rng.integers(0, 600, 600)
        drawn.append(equalized_odds(one.labels[rows], one.predictions[rows], np.array(groups)[rows]))
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.04)
    assert fairness(one, groups, bootstraps=0)["equalized_odds_interval"] is None


def test_each_group_is_as_if_it_were_alone() -> None:
    one, groups = judged()
    found = fairness(one, groups, bootstraps=40)
    assert set(found["measures"]) == {
        "accuracy",
        "balanced accuracy",
        "AUC",
        "calibration error",
        "high-risk sensitivity",
    }
    for name, measure in one.measures().items():
        said = found["measures"][name]
        by = {g: measure(np.flatnonzero(np.array(groups) == g)) for g in "abc"}
        assert said["by_group"] == pytest.approx(by) and said["overall"] == pytest.approx(measure(np.arange(600)))
        assert said["gap"] == pytest.approx(max(by.values()) - min(by.values()))
        assert said["interval"][0] <= said["interval"][1]
    accuracy = found["measures"]["accuracy"]
    assert accuracy["worst_group"] == "b" and accuracy["worst"] == min(accuracy["by_group"].values())
    assert found["measures"]["calibration error"]["worst"] == max(
        found["measures"]["calibration error"]["by_group"].values()
    )


def test_the_intervals_of_gaps_cover() -> None:
    """A gap of 0.2 in accuracy: wrong labels are right by chance in a third of the cases."""
    inside = 0
    for seed in range(6):
        one, groups = judged(1500, wrong=0.3, seed=seed)
        low, high = fairness(one, groups, bootstraps=40, seed=seed)["measures"]["accuracy"]["interval"]
        inside += low <= 0.2 <= high
    assert inside >= 4


def test_small_groups_and_missing_ones_are_said() -> None:
    one, groups = judged()
    some = ["rare" if i < 5 else None if i < 20 else groups[i] for i in range(600)]
    found = fairness(one, some, bootstraps=0)
    assert found["left_out"] == ["rare"] and found["without"] == 15 and found["examples"]["rare"] == 5
    assert set(found["measures"]["accuracy"]["by_group"]) == set("abc")
    alone = fairness(one, ["a"] * 600, bootstraps=0)
    assert alone["measures"] == {} and "fewer than two groups" in alone["reason"]


def replicated(seeds: int = 4, n: int = 240, gain: float = 0.0, seed: int = 0) -> np.ndarray:
    """bool [seeds, n]: right in 60 % of the cases of group a and 80 % of the others, and `gain` more often on a."""
    rng = np.random.default_rng(seed)
    rate = np.where(np.arange(n) % 3 == 0, 0.6 + gain, 0.8)
    return rng.random((seeds, n)) < rate


GROUPS = [str("abc"[i % 3]) for i in range(240)]


def test_accuracy_gap_and_worst_group_of_replicates_written_out() -> None:
    right = replicated()
    found = replicates(right, GROUPS)
    for run in range(4):
        by = [np.mean([right[run][i] for i in range(240) if GROUPS[i] == g]) for g in "abc"]
        assert found["gap"][run] == pytest.approx(max(by) - min(by)) and found["worst"][run] == pytest.approx(min(by))
        assert found["accuracy"][run] == pytest.approx(right[run].mean())


def test_a_planted_gain_is_found_and_none_is_not() -> None:
    better, base = replicated(12, gain=0.2, seed=1), replicated(12, seed=2)
    found = paired_over_seeds(better, base, GROUPS, bootstraps=400)
    difference = replicates(better, GROUPS)["gap"].mean() - replicates(base, GROUPS)["gap"].mean()
    assert found["gap"]["difference"] == pytest.approx(difference) and found["gap"]["interval"][1] < 0
    assert found["worst"]["p"] < 0.02 and found["accuracy"]["interval"][0] < 0.2 / 3 < found["accuracy"]["interval"][1]
    same = paired_over_seeds(base, base, GROUPS, bootstraps=50)
    assert same["gap"] == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}


def test_false_alarms_over_seeds_are_as_rare_as_promised_with_and_without_clusters() -> None:
    """Forty comparisons of equals at 5 %; with near duplicates only clusters hold that."""
    alarms = {True: 0, False: 0}
    for trial in range(40):
        few = [np.tile(replicated(1, 60, seed=1000 * side + trial), (4, 1)) for side in (1, 2)]  # seeds that agree
        one, other = (np.repeat(side, 4, axis=1) for side in few)  # four near duplicates of each
        groups, clusters = np.repeat([str("abc"[i % 3]) for i in range(60)], 4), np.repeat(np.arange(60), 4)
        for clustered in alarms:
            found = paired_over_seeds(one, other, groups, clusters if clustered else None, bootstraps=200, seed=trial)
            alarms[clustered] += found["accuracy"]["p"] < 0.05
    assert alarms[True] <= 7 < alarms[False]


def test_adjusted_p_values_are_holms() -> None:
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([0.6, 0.7]) == [1.0, 1.0] and adjusted([]) == []
