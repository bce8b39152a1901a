"""SkewSize of a thousand classes against a loop over them with `scipy.stats`, whose correction of the bias is by hand.

Both give the same effect sizes and skew, which is checked before anything is timed. They take turns in one process, once
without and once with a null by permutation. Ours gives p-values, gaps and the tables of what drives it in either.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from scipy import stats

from rayproj.benchmarks.runtime import Row, in_turns
from rayproj.evaluation.skewsize import skewsize

ROUNDS, THREADS = 5, 1
CLASSES, EXAMPLES, GROUPS, PERMUTATIONS = 1000, 50_000, 8, 10
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def drawn() -> Columns:
    """Labels, predictions of which three in ten are wrong, and groups."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), EXAMPLES // CLASSES)
    wrong = rng.random(EXAMPLES) < 0.3
    return labels, np.where(wrong, rng.integers(0, CLASSES, EXAMPLES), labels), rng.integers(0, GROUPS, EXAMPLES)


def ours(columns: Columns, permutations: int) -> tuple[list[float], float, list[float]]:
    """The effect of each class, their skew, and that of the null's mean."""
    names = tuple(map(str, range(CLASSES)))
    found = skewsize(*columns, names, permutations=permutations, bootstraps=0)
    return list(found["effects"].values()), found["value"], [found["null_mean"]]


def by_class(columns: Columns, permutations: int) -> tuple[list[float], float, list[float]]:
    """The same, class by class; each permutation is of the groups within the classes."""
    labels, predictions, groups = columns
    rows = [np.flatnonzero(labels == label) for label in range(CLASSES)]
    effects = [corrected(predictions[own], groups[own]) for own in rows]
    rng, null = np.random.default_rng(1), list[float]()
    for _ in range(permutations):
        null.append(float(stats.skew([corrected(predictions[own], rng.permutation(groups[own])) for own in rows])))
    return effects, float(stats.skew(effects)), [float(np.mean(null)) if null else math.nan]


def corrected(predictions: np.ndarray, groups: np.ndarray) -> float:
    """Cramér's V, bias-corrected (Bergsma 2013)."""
    table = stats.contingency.crosstab(predictions, groups).count
    n, (r, k) = table.sum(), table.shape
    if min(r, k) < 2:
        return 0.0
    v = stats.contingency.association(table, method="cramer")
    phi2 = max(0.0, v**2 * (min(r, k) - 1) - (r - 1) * (k - 1) / (n - 1))
    return math.sqrt(phi2 / (min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1))


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    torch.set_num_threads(THREADS)
    columns = drawn()
    one, other = ours(columns, PERMUTATIONS), by_class(columns, PERMUTATIONS)
    np.testing.assert_allclose(one[0], other[0], atol=1e-9)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-9)
    np.testing.assert_allclose(one[2], other[2], atol=0.1)  # other permutations
    what = f"SkewSize of {CLASSES:,} classes, {EXAMPLES:,} predictions, {GROUPS} groups"
    peer = "loop over the classes, scipy.stats"
    return [
        in_turns(f"{what}{more}", partial(ours, columns, n), peer, partial(by_class, columns, n), ROUNDS)
        for n, more in ((0, ""), (PERMUTATIONS, f", {PERMUTATIONS} permutations"))
    ]
