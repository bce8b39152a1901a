"""Models compared prompt by prompt, and how often a measure orders them as people do (Imagen 3, arXiv 2408.07009,
section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from rayproj.evaluation.proportions import Rate

LEVEL = 0.05
DRAWS = 2000

Order = int
"""1: the first of a pair is better; -1: the second; 0: neither."""


def mean_interval(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The mean of what is a number, with its 95 % interval by a percentile bootstrap over prompts; None of none."""
    there = values[np.isfinite(values)]
    if not len(there):
        return {"n": 0, "mean": None, "low": None, "high": None}
    rng = np.random.default_rng(seed)
    means = there[rng.integers(0, len(there), (DRAWS, len(there)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"n": len(there), "mean": float(there.mean()), "low": float(low), "high": float(high)}


def compared(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Two models' scores of the same prompts [n]: the mean difference with its interval, and Wilcoxon's signed-rank test.

    Returns:
        n: prompts on which both have a score; difference, low, high; p: of the two-sided test, 1 where all are equal;
            order.
    """
    both = np.isfinite(first) & np.isfinite(second)
    difference = first[both] - second[both]
    found = mean_interval(difference, seed)
    p = float(stats.wilcoxon(difference).pvalue) if np.any(difference != 0) else 1.0
    order = int(np.sign(found["mean"])) if p < LEVEL else 0
    return {
        "n": found["n"],
        "difference": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "p": p,
        "order": order,
    }


def orders(scores: Mapping[str, np.ndarray]) -> dict[tuple[str, str], Order]:
    """Of each pair of models, by their scores of the same prompts."""
    return {(a, b): compared(scores[a], scores[b])["order"] for a, b in combinations(scores, 2)}


def human_order(wins: int, losses: int) -> Order:
    """By ratings without the indifferent ones; neither where the 95 % interval of the share of wins holds a half."""
    low, high = Rate(wins, wins + losses).interval()
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
