"""Scores of uncertainty against scikit-learn, naive loops and worked-out cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from rayproj.evaluation import uncertainty
from rayproj.evaluation.fairness import calibration_error


def judged(n: int = 400, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.4), n)
    return np.array([rng.choice(classes, p=0.6 * p + 0.4 / classes) for p in probabilities]), probabilities


def test_brier_score_is_scikit_learns() -> None:
    labels, p = judged()
    expected = sum(metrics.brier_score_loss(labels == c, p[:, c]) for c in range(5))
    assert uncertainty.brier_score(labels, p) == pytest.approx(expected)


def test_calibration_errors_against_a_loop_over_bins() -> None:
    labels, p = judged()
    confidence, right = p.max(1), p.argmax(1) == labels
    ece = square = 0.0
    for b in range(15):
        inside = [i for i in range(400) if min(int(confidence[i] * 15), 14) == b]
        if inside:
            gap = np.mean(confidence[inside]) - np.mean(right[inside])
            ece += len(inside) / 400 * abs(gap)
            square += len(inside) / 400 * gap**2
    assert calibration_error(labels, p) == pytest.approx(ece)
    assert uncertainty.rms_calibration_error(labels, p) == pytest.approx(math.sqrt(square))
    assert uncertainty.rms_calibration_error(labels, p) >= calibration_error(labels, p)


@pytest.mark.parametrize("digits", [8, 1], ids=["distinct", "ties"])
def test_detection_is_scikit_learns(digits: int) -> None:
    rng = np.random.default_rng(1)
    known, unknown = rng.normal(0, 1, 300).round(digits), rng.normal(0.8, 1, 90).round(digits)
    found = uncertainty.detection(known, unknown)
    truth, scores = np.r_[np.zeros(300), np.ones(90)], np.r_[known, unknown]
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert found["aupr"] == pytest.approx(metrics.average_precision_score(truth, scores))
    assert found["share"] == pytest.approx(90 / 390)


def test_doubt_is_taken_apart() -> None:
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.ones(4), (30, 6))
    found = uncertainty.decomposition(p)
    assert found["total"] == pytest.approx([stats.entropy(p[:, i].mean(0)) for i in range(6)])
    assert found["aleatoric"] == pytest.approx([np.mean([stats.entropy(q) for q in p[:, i]]) for i in range(6)])
    divergence = [np.mean([stats.entropy(q, p[:, i].mean(0)) for q in p[:, i]]) for i in range(6)]
    assert found["epistemic"] == pytest.approx(divergence), "mutual information is the mean divergence from the mean"
    certain = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # indices that are sure, and differ
    assert [v[0] for v in uncertainty.decomposition(certain).values()] == pytest.approx([math.log(2), 0, math.log(2)])


def test_indices_that_guess_otherwise_and_margins_against_a_loop() -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(4), (15, 8))
    ratios, margins = [], []
    for i in range(8):
        guesses = [int(q.argmax()) for q in p[:, i]]
        ratios.append(1 - max(guesses.count(c) for c in range(4)) / 15)
        first, second = sorted(p[:, i].mean(0))[:-3:-1]
        margins.append(1 - (first - second))
    assert uncertainty.variation_ratio(p) == pytest.approx(ratios) and min(ratios) > 0
    assert uncertainty.margin(p.mean(0)) == pytest.approx(margins)
    assert uncertainty.margin(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist() == [1, 0]


def test_the_area_of_risk_over_coverage() -> None:
    labels, p = judged(50)
    order = sorted(range(50), key=lambda i: -p[i].max())
    risks = [np.mean([p[i].argmax() != labels[i] for i in order[: k + 1]]) for k in range(50)]
    assert uncertainty.risk_coverage_area(labels, p) == pytest.approx(np.mean(risks))
    assert uncertainty.risk_coverage_area(p.argmax(1), p) == 0


ALEXNET_GAUSSIAN = [0.69528, 0.82542, 0.93554, 0.98138, 0.99452]  # on ImageNet-C, as its authors published them


def test_corruption_errors_by_name() -> None:
    alexnet = {"gaussian_noise": ALEXNET_GAUSSIAN, "fog": [0.5, 0.6, 0.7, 0.8, 0.9]}
    plain = uncertainty.corruption_errors({"gaussian_noise": ALEXNET_GAUSSIAN})
    assert plain == {"mean_corruption_error": pytest.approx(0.8864, abs=5e-5)}
    halved = {name: [e / 2 for e in errors] for name, errors in alexnet.items()}
    found = uncertainty.corruption_errors(halved, alexnet)
    assert found["mce_normalised"] == pytest.approx(0.5)
    skewed = uncertainty.corruption_errors({**alexnet, "fog": [0.1] * 5}, alexnet)
    assert skewed["corruption_errors_normalised"] == pytest.approx({"gaussian_noise": 1.0, "fog": 0.5 / 3.5})
    assert skewed["mce_normalised"] == pytest.approx((1 + 0.5 / 3.5) / 2)
