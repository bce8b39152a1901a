"""How well a classifier does by group: the usual measures, their worst group and their gap, by fairlearn's `MetricFrame`
(Weerts et al. 2023, "Fairlearn: Assessing and Improving Fairness of AI Systems").

The gap is the largest value of a group less the smallest. What a small group shows is mostly noise: groups with few examples
are left out, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from rayproj.errors import UserError

BINS = 15  # of the calibration error
Measure = Callable[[np.ndarray], float]
"""Of the examples with these numbers; NaN where it is not defined for them."""


@dataclass(frozen=True)
class Judged:
    """What a classifier said of test images.

    Attributes:
        labels: int [n].
        probabilities: fp [n, classes], rows summing to 1.
        high_risk: classes that must not be missed.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    high_risk: tuple[int, ...] = ()

    @property
    def predictions(self) -> np.ndarray:
        return self.probabilities.argmax(1)

    def measures(self) -> dict[str, Measure]:
        found: dict[str, Measure] = {
            "accuracy": lambda at: float((self.predictions[at] == self.labels[at]).mean()),
            "balanced accuracy": lambda at: balanced_accuracy(self.labels[at], self.predictions[at]),
            "AUC": lambda at: macro_auc(self.labels[at], self.probabilities[at]),
            "calibration error": lambda at: calibration_error(self.labels[at], self.probabilities[at]),
        }
        if self.high_risk:
            found["high-risk sensitivity"] = lambda at: sensitivity(
                self.labels[at], self.predictions[at], self.high_risk
            )
        return found


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over the classes that occur of the share of their examples that are right."""
    return float(np.mean([(predictions[labels == c] == c).mean() for c in np.unique(labels)]))


def macro_auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over classes, of which there are examples and others, of the area under the curve against the rest; of two
    classes that of the second. The area is the statistic of Mann and Whitney (Hanley and McNeil 1982)."""
    found = []
    for c in range(probabilities.shape[1])[1 if probabilities.shape[1] == 2 else 0 :]:
        theirs = labels == c
        n = int(theirs.sum())
        if 0 < n < len(labels):
            above = scipy.stats.rankdata(probabilities[:, c])[theirs].sum() - n * (n + 1) / 2
            found.append(above / (n * (len(labels) - n)))
    return float(np.mean(found)) if found else math.nan


def sensitivity(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[int]) -> float:
    """The share of the examples of these classes that are taken for one of these."""
    theirs = np.isin(labels, classes)
    return float(np.isin(predictions[theirs], classes).mean()) if theirs.any() else math.nan


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error of the most probable class, over bins of equal width (Guo et al. 2017, eq. 3)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, right, BINS) - np.bincount(place, confidence, BINS)
    return float(np.abs(gaps).sum() / len(labels))


def equalized_odds(labels: np.ndarray, predictions: np.ndarray, groups: np.ndarray) -> float:
    """The largest difference between groups of a class's true or false positive rate, over classes (Hardt et al. 2016), each
    against the rest.

    A group has a say in a class's true positive rate only if it has examples of the class, and in its false positive rate
    only if it has others; fairlearn counts the rate as 0 there, which makes a difference of nothing. NaN where no rate of
    two groups can be compared.
    """
    classes, codes = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    names, group = np.unique(groups, return_inverse=True)
    truth, said = np.split(codes, 2)
    shape = (len(names), len(classes))

    def counted(of: np.ndarray, where: np.ndarray) -> np.ndarray:
        cells = np.ravel_multi_index((group[where], of[where]), shape)
        return np.bincount(cells, minlength=math.prod(shape)).reshape(shape).astype(float)

    every = np.ones(len(truth), bool)
    there, hits, taken = counted(truth, every), counted(truth, truth == said), counted(said, every)
    others = there.sum(1, keepdims=True) - there
    found = []
    for part, whole in ((hits, there), (taken - hits, others)):
        most = np.where(whole > 0, part / np.maximum(whole, 1), -np.inf).max(0)
        least = np.where(whole > 0, part / np.maximum(whole, 1), np.inf).min(0)
        found += (most - least)[(whole > 0).sum(0) >= 2].tolist()
    return max(found, default=math.nan)


def fairness(
    judged: Judged, groups: Sequence[Any], least: int = 30, bootstraps: int = 200, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Each measure overall, by group, of the worst group, and its gap with an interval.

    Args:
        groups: [n], of one grouping variable; None where it is not known.
        least: groups with fewer examples are left out.
        bootstraps: draws of the examples, for the intervals.

    Returns:
        "measures": by name, "overall", "by_group", "worst_group", "worst" (the least, of the calibration error the most),
        "gap" and "interval"; "equalized_odds" and its interval; "examples" by group; the groups left out, and
        how many examples have none.

    Raises:
        UserError: fairlearn is not there.
    """
    try:
        from fairlearn.metrics import MetricFrame
    except ImportError as error:
        raise UserError("evaluate.groups needs fairlearn; pip install 'rayproj[fairness]'.") from error
    named = np.array(["" if g is None or g != g else str(g) for g in groups], object)
    kinds, counts = np.unique(named[named != ""], return_counts=True)
    kept = [str(g) for g, n in zip(kinds, counts, strict=True) if n >= least]
    said: dict[str, Any] = {
        "examples": {str(g): int(n) for g, n in zip(kinds, counts, strict=True)},
        "left_out": [str(g) for g in kinds if str(g) not in kept],
        "without": int((named == "").sum()),
    }
    at = np.flatnonzero(np.isin(named, kept))
    if len(kept) < 2:
        return {**said, "measures": {}, "equalized_odds": None, "reason": f"fewer than two groups of {least} examples"}
    # The frame hands its metrics a part of each column: the numbers of the examples tell all else.
    metrics = {name: (lambda _, part, f=f: f(np.asarray(part))) for name, f in judged.measures().items()}
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    frame = MetricFrame(
        metrics=metrics, y_true=judged.labels[at], y_pred=at, sensitive_features=named[at].astype(str),
        n_boot=bootstraps or None, ci_quantiles=quantiles if bootstraps else None, random_state=seed if bootstraps else None,
    )  # fmt: skip
    gaps, found = frame.difference(), {}
    spread = frame.difference_ci() if bootstraps else [gaps, gaps]
    for name in metrics:
        by = {group: float(v) for group, v in frame.by_group[name].items() if v == v}
        worst = (max if name == "calibration error" else min)(by, key=lambda group: by[group]) if by else ""
        found[name] = {
            "overall": _number(frame.overall[name]),
            "by_group": by,
            "worst_group": worst,
            "worst": by.get(worst),
            "gap": _number(gaps[name]),
            "interval": [_number(side[name]) for side in spread] if bootstraps else None,
        }
    columns = judged.labels[at], judged.predictions[at], named[at].astype(str)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(at), len(at)) for _ in range(bootstraps))
    drawn = [v for v in (equalized_odds(*(of[rows] for of in columns)) for rows in draws) if v == v]
    return {
        **said,
        "measures": found,
        "equalized_odds": _number(equalized_odds(*columns)),
        "equalized_odds_interval": np.quantile(drawn, quantiles).tolist() if drawn else None,
        "reason": "",
    }


def _difference(seen: float, drawn: np.ndarray) -> dict[str, Any]:
    """A difference with the 95 % interval and the two-sided p-value of its bootstrap [draws]."""
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
    p = min(1.0, 2 * max(tail, 1 / (len(drawn) + 1)))
    return {"difference": float(seen), "interval": [float(low), float(high)], "p": float(p)}


def replicates(right: np.ndarray, groups: Sequence[Any]) -> dict[str, np.ndarray]:
    """ "accuracy", its "gap" between groups and that of the "worst" group, fp [runs] each.

    Args:
        right: bool [runs, n]: whether a run of the same training under another seed is right on an image.
        groups: [n]; the accuracy is the mean over the images.
    """
    return _of_counts(*(counts.sum(-2) for counts in _counts(right, groups, np.zeros(right.shape[1], int))))


def _counts(right: np.ndarray, groups: Sequence[Any], cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many images of each cluster and group are right, [runs, clusters, groups], and how many there are."""
    group = np.unique([str(g) for g in groups], return_inverse=True)[1]
    shape = (int(cluster.max()) + 1, int(group.max()) + 1)
    cell = np.ravel_multi_index((cluster, group), shape)
    hits = [np.bincount(cell, run, math.prod(shape)).reshape(shape) for run in right]
    images = np.bincount(cell, minlength=math.prod(shape)).reshape(shape)
    return np.stack(hits), np.broadcast_to(images, (len(right), *shape))


def _of_counts(hits: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of `replicates`, of counts by group [..., groups]; a group without an image has no say."""
    by = np.where(images > 0, hits / np.maximum(images, 1), np.nan)
    best, worst = np.nanmax(by, -1), np.nanmin(by, -1)
    return {"accuracy": hits.sum(-1) / images.sum(-1), "gap": best - worst, "worst": worst}


def paired_over_seeds(
    ours: np.ndarray, theirs: np.ndarray, groups: Sequence[Any], clusters: Sequence[Any] | None = None,
    bootstraps: int = 2000, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """How two trainings differ on the same test images under the same seeds: means over the seeds of ours less theirs, of
    what `replicates` gives, each with a 95 % interval and a two-sided p-value. Images and seeds are drawn anew, the same for
    both sides (Efron and Tibshirani 1993, section 16.4).

    Args:
        ours, theirs: bool [seeds, n].
        clusters: [n]: images that are alike and are drawn together (Davison and Hinkley 1997, section 3.8); None: each by
            itself.
    """
    assert ours.shape == theirs.shape, "not the same seeds or images"
    rng, (seeds, n) = np.random.default_rng(seed), ours.shape
    place = np.arange(n) if clusters is None else np.unique([str(c) for c in clusters], return_inverse=True)[1]
    kinds = int(place.max()) + 1
    hits, images = _counts(np.concatenate([ours, theirs]), groups, place)
    # How often each cluster and seed is drawn, [draws, ...]; the first draw is what was seen.
    often = np.concatenate([np.ones((1, kinds)), rng.multinomial(kinds, np.full(kinds, 1 / kinds), bootstraps)])
    share = np.concatenate([np.ones((1, seeds)), rng.multinomial(seeds, np.full(seeds, 1 / seeds), bootstraps)]) / seeds
    found = {}
    measured = _of_counts(*(np.einsum("dk,rkg->drg", often, counts, optimize=True) for counts in (hits, images)))
    for name, values in measured.items():
        differences = ((values[:, :seeds] - values[:, seeds:]) * share).sum(1)
        found[name] = _difference(differences[0], differences[1:])
    return found


def adjusted(p: Sequence[float]) -> list[float]:
    """p-values of several tests so that 5 % is the chance of any false one (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p, float)[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(stepped, 1)
    return found.tolist()


def _number(value: Any) -> float | None:
    return float(value) if value == value else None
