"""Models compared prompt by prompt, and how often a measure orders them as people do (Imagen 3, arXiv 2408.07009,
section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from rayproj.evaluation.proportions import LEAST, Rate, over_clusters

LEVEL = 0.05
DRAWS = 2000
EXACT = 200  # differences up to which a p is exact
DIGITS = 12  # after which differences that rounding alone parts are equal

Order = int
"""1: the first of a pair is better; -1: the second; 0: neither."""


def mean_interval(values: np.ndarray, seed: int = 0, images: float | None = None) -> dict[str, Any]:
    """The mean of what is a number, None of none, with its 95 % interval over prompts: of `over_clusters` where each value
    is the share of a prompt's images or their parts, else by a percentile bootstrap.

    Args:
        images: of each prompt, where values are shares.

    Returns:
        n, mean, and low and high; these are None of fewer than LEAST prompts, and where a bootstrap draws from equal values.
    """
    there = values[np.isfinite(values)]
    n, ends = len(there), None
    if images is not None:
        ends = over_clusters(there * images, np.full(n, images))
    elif n >= LEAST and np.ptp(there) > 0:
        means = there[np.random.default_rng(seed).integers(0, n, (DRAWS, n))].mean(1)
        ends = float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
    low, high = ends or (None, None)
    return {"n": n, "mean": float(there.mean()) if n else None, "low": low, "high": high}


def signed_ranks(difference: np.ndarray) -> tuple[float, float]:
    """Wilcoxon's (1945) signed-rank test of differences [n], two-sided.

    Zeros are left out, as by Wilcoxon and not as by Pratt (1959), who ranks them with the others; equal sizes share their
    mean rank. p is exact, over all signs that these ranks may have: the normal approximation is too sure of few differences
    of one size (of 14, 11 of which have one sign, p is 0.057 and not 0.033). Of more than EXACT it is that approximation.

    Returns:
        The rank-biserial correlation (W⁺ - W⁻) / (W⁺ + W⁻) (Kerby 2014), 0 of none; and p, 1 of none.
    """
    there = np.round(difference, DIGITS)
    there = there[there != 0]
    if not len(there):
        return 0.0, 1.0
    rank = stats.rankdata(np.abs(there))
    correlation = float((np.sign(there) * rank).sum() / rank.sum())
    if len(there) > EXACT:
        return correlation, float(stats.wilcoxon(there, method="asymptotic").pvalue)
    chance = np.ones(1)  # of each value of 2 W⁺, which is whole
    for step in (2 * rank).astype(int):
        chance = (np.pad(chance, (0, step)) + np.pad(chance, (step, 0))) / 2
    least = int(2 * min(rank[there > 0].sum(), rank[there < 0].sum()))
    return correlation, min(1.0, 2 * float(chance[: least + 1].sum()))


def compared(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Two models' scores of the same prompts [n]: the mean difference with its interval, and Wilcoxon's signed-rank test.

    Returns:
        n: prompts on which both have a score; difference, low, high; ranks, p: of `signed_ranks`; order: the sign of
            `ranks`, of which p is, where p < LEVEL and the mean has the same sign, else 0.
    """
    both = np.isfinite(first) & np.isfinite(second)
    difference = first[both] - second[both]
    found = mean_interval(difference, seed)
    ranks, p = signed_ranks(difference)
    sure = p < LEVEL and np.sign(found["mean"]) == np.sign(ranks)
    return {
        "n": found["n"],
        "difference": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "ranks": ranks,
        "p": p,
        "order": int(np.sign(ranks)) if sure else 0,
    }


def human_order(wins: int, losses: int) -> Order:
    """By ratings without the indifferent ones, taken as independent; neither where the 95 % interval of the share of wins
    holds a half."""
    return _decided(Rate(wins, wins + losses).interval())


def raters_order(wins: np.ndarray, losses: np.ndarray) -> Order:
    """The same by how often each rater [n] said which; neither with fewer than LEAST raters."""
    return _decided(over_clusters(wins, wins + losses))


def _decided(interval: tuple[float, float] | None) -> Order:
    low, high = interval or (0.0, 1.0)
    return 1 if low > 0.5 else -1 if high < 0.5 else 0


def agreement(
    measures: Mapping[str, Mapping[tuple[str, str], Order]], people: Mapping[tuple[str, str], Order]
) -> dict[str, Any]:
    """How often each measure has the order of people, over the pairs that both know; and where two measures have the same
    order, how often it is that of people.

    Returns:
        "measures": name -> {agree, pairs, share, low, high}; "both": "a, b" -> the same, with "same", the share of pairs on
        which the two have the same order.
    """
    each = {name: _share(found, people) for name, found in measures.items()}
    both = {}
    for a, b in combinations(measures, 2):
        pairs = measures[a].keys() & measures[b].keys() & people.keys()
        same = {pair: measures[a][pair] for pair in pairs if measures[a][pair] == measures[b][pair]}
        both[f"{a}, {b}"] = {**_share(same, people), "same": len(same) / len(pairs) if pairs else None}
    return {"measures": each, "both": both}


def _share(found: Mapping[tuple[str, str], Order], people: Mapping[tuple[str, str], Order]) -> dict[str, Any]:
    pairs = sorted(found.keys() & people.keys())
    rate = Rate(sum(found[pair] == people[pair] for pair in pairs), len(pairs))
    return {"agree": rate.failures, "pairs": rate.images, **rate.share()}
