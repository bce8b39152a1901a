"""SkewSize: bias as the skew, over classes, of the effect size of a subgroup on the predictions (Albuquerque et al. 2024,
"Evaluating Model Bias Requires Characterizing its Mistakes").

The value is not monotone in bias: one biased class among many raises it, bias in all classes brings it back. It is
therefore always given with the mean and quantiles of the effect sizes and a permutation null.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def contingency(labels: np.ndarray, predictions: np.ndarray, groups: np.ndarray) -> dict[int, np.ndarray]:
    """For each class, counts [predictions that occur, groups that occur] over its examples."""
    tables = {}
    for label in np.unique(labels):
        rows, i = np.unique(predictions[labels == label], return_inverse=True)
        columns, j = np.unique(groups[labels == label], return_inverse=True)
        table = np.zeros((len(rows), len(columns)), np.int64)
        np.add.at(table, (i, j), 1)
        tables[int(label)] = table
    return tables


def cramers_v(table: np.ndarray, corrected: bool = True) -> float:
    """Cramér's V of a contingency table, bias-corrected (Bergsma 2013) by default; empty rows and columns do not count.

    A table of one row or one column has V = 0: there is nothing that could depend.
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0].astype(np.float64)
    r, k = table.shape
    n = table.sum()
    if r < 2 or k < 2:
        return 0.0
    expected = np.outer(table.sum(1), table.sum(0)) / n
    phi2 = ((table - expected) ** 2 / expected).sum() / n
    if not corrected:
        return math.sqrt(phi2 / min(r - 1, k - 1))
    phi2 = max(0.0, phi2 - (r - 1) * (k - 1) / (n - 1))
    r, k = r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)
    return math.sqrt(phi2 / min(r - 1, k - 1))


def skewness(values: np.ndarray) -> float:
    """Fisher-Pearson g1 = m3 / m2^(3/2); NaN for fewer than three values or no spread."""
    values = np.asarray(values, np.float64)
    if len(values) < 3:
        return math.nan
    centred = values - values.mean()
    m2 = (centred**2).mean()
    return float((centred**3).mean() / m2**1.5) if m2 > 1e-18 else math.nan


def skewsize(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: np.ndarray,
    classes: tuple[str, ...],
    corrected: bool = True,
    min_examples: int = 10,
    permutations: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """SkewSize with what is needed to read it.

    Args:
        labels, predictions: int [n].
        groups: [n], any values that compare.
        min_examples: classes with fewer are skipped, and counted.
        permutations: shuffles of the groups within each class, for the null.

    Returns:
        "value" (None where undefined, with "reason"), effect sizes by class and their mean, quantiles and maximum, the
        null's mean and standard deviation and the share of it at or above the value, and the classes skipped.
    """
    kept = [c for c in np.unique(labels) if (labels == c).sum() >= min_examples]
    inside = np.isin(labels, kept)
    labels, predictions, groups = labels[inside], predictions[inside], groups[inside]
    effects = {c: cramers_v(t, corrected) for c, t in contingency(labels, predictions, groups).items()}
    values = np.array(list(effects.values()))
    value = skewness(values)
    rng = np.random.default_rng(seed)
    null = []
    for _ in range(permutations):
        shuffled = groups.copy()
        for c in kept:
            where = np.flatnonzero(labels == c)
            shuffled[where] = groups[rng.permutation(where)]
        tables = contingency(labels, predictions, shuffled).values()
        null.append(skewness(np.array([cramers_v(t, corrected) for t in tables])))
    finite = np.array([x for x in null if math.isfinite(x)])
    defined = math.isfinite(value)
    return {
        "value": value if defined else None,
        "reason": "" if defined else "fewer than three classes, or effect sizes without spread",
        "corrected": corrected,
        "effects": {classes[c]: v for c, v in effects.items()},
        "mean": float(values.mean()) if len(values) else None,
        "median": float(np.quantile(values, 0.5)) if len(values) else None,
        "q90": float(np.quantile(values, 0.9)) if len(values) else None,
        "max": float(values.max()) if len(values) else None,
        "null_mean": float(finite.mean()) if len(finite) else None,
        "null_std": float(finite.std(ddof=1)) if len(finite) > 1 else None,
        "null_share_at_or_above": float((finite >= value).mean()) if defined and len(finite) else None,
        "classes_skipped": len(classes) - len(kept),
    }
