"""How far a classifier's probabilities can be trusted: proper scores, calibration, selective prediction, the detection of
what it does not know, and how much of its doubt more data would take away."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy

from rayproj.evaluation.fairness import BINS


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean squared distance to the one-hot labels, in [0, 2] (Brier 1950)."""
    target = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - target) ** 2).sum(1).mean())


def rms_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Root of the mean squared gap between confidence and accuracy, over bins of equal width (Hendrycks et al. 2019, "Deep
    Anomaly Detection with Outlier Exposure", section 4.5, with the bins of `fairness.calibration_error`)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    gaps = np.bincount(place, right, BINS) - np.bincount(place, confidence, BINS)
    return float(math.sqrt((gaps**2 / np.maximum(count, 1)).sum() / len(labels)))


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -np.asarray(scipy.special.xlogy(probabilities, probabilities)).sum(-1)


def decomposition(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """The doubt of each example, nats [n]: "total", of the mean prediction; "aleatoric", what each index has on average; and
    "epistemic", their difference, the mutual information of label and index (Depeweg et al. 2018, eq. 4-5).

    Args:
        probabilities: [Z, n, classes].
    """
    total, aleatoric = entropy(probabilities.mean(0)), entropy(probabilities).mean(0)
    return {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}


def variation_ratio(probabilities: np.ndarray) -> np.ndarray:
    """The share of the indices that guess otherwise than most of them do, [n] (Freeman 1965; Gal 2016, section 3.3).

    Args:
        probabilities: [Z, n, classes].
    """
    guesses = np.eye(probabilities.shape[2])[probabilities.argmax(2)]
    return np.asarray(1 - guesses.mean(0).max(1))


def margin(probabilities: np.ndarray) -> np.ndarray:
    """One less what the likeliest class has more than the next, [n]: 1 where they are alike (Scheffer et al. 2001).

    Args:
        probabilities: [n, classes].
    """
    first, second = np.sort(probabilities, axis=1)[:, :-3:-1].T
    return np.asarray(1 - (first - second))


def detection(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """How well a score tells what is of no class, of which it is to be higher: area under the ROC curve, and under that of
    precision over recall (average precision) with what is of no class as the positives, which depends on their share.

    Args:
        known: scores of examples of the classes.
        unknown: of others.
    """
    scores, positive = np.concatenate([unknown, known]), np.arange(len(unknown) + len(known)) < len(unknown)
    above = scipy.stats.rankdata(scores)[positive].sum() - len(unknown) * (len(unknown) + 1) / 2
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of those that have the same score
    hits, seen = np.cumsum(positive[order])[last], (np.arange(len(scores)) + 1)[last]
    gained = np.diff(hits, prepend=0) / len(unknown)
    return {
        "auroc": float(above / (len(unknown) * len(known))),
        "aupr": float((gained * hits / seen).sum()),
        "share": len(unknown) / len(scores),
    }


def risk_coverage_area(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The error among the k most confident examples, averaged over all k (Geifman et al. 2019, "AURC")."""
    order = np.argsort(-probabilities.max(1), kind="stable")
    wrong = (probabilities.argmax(1) != labels)[order]
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def corruption_errors(errors: dict[str, list[float]], baseline: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """Errors by corruption and severity in one number (Hendrycks and Dietterich 2019, section 4). Which of them is meant by
    "mCE" differs from paper to paper, so each has a name.

    Args:
        errors: corruption -> the error at each severity.
        baseline: the same of the network that the errors are divided by.

    Returns:
        "mean_corruption_error": not normalised. With a baseline: "corruption_errors_normalised", CE of each corruption, and
        "mce_normalised", their mean.
    """
    found: dict[str, Any] = {"mean_corruption_error": float(np.mean([np.mean(e) for e in errors.values()]))}
    if baseline:
        ratios = {name: sum(values) / sum(baseline[name]) for name, values in errors.items() if sum(baseline[name])}
        found["corruption_errors_normalised"] = ratios
        found["mce_normalised"] = float(np.mean(list(ratios.values()))) if ratios else math.nan
    return found
