"""Failures that are alike: the same wrong answer, and similar features."""

from __future__ import annotations

import numpy as np
from scipy.cluster import hierarchy

SIZE, MOST = 12, 6  # failures of a cluster, about; clusters of one wrong answer, at most
SAMPLE = 2000  # failures that are agglomerated, at most: memory and time grow with the square of their number
HALVES = 10  # by which stability is measured


def clusters(answers: np.ndarray, features: np.ndarray | None) -> np.ndarray:
    """The cluster of each failure, int64 [n]: by wrong answer, and then by Ward's agglomeration of the features at length
    one. Of more than `SAMPLE` failures of one answer, so many that a fixed seed draws are agglomerated, and the others join
    the cluster whose mean is nearest.

    Args:
        answers: int [n], the wrong classes.
        features: fp32 [n, D]; None: the wrong answer alone counts.
    """
    found, number = np.zeros(len(answers), np.int64), 0
    for answer in np.unique(answers):
        of = np.flatnonzero(answers == answer)
        count = 1 if features is None else _count(len(of))
        found[of] = number
        if features is not None and count > 1:
            found[of] += _split(features[of], count)
        number += count
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def stability(features: np.ndarray, seed: int = 0) -> float:
    """How far the clusters of failures of one wrong answer hang on those that happened to be seen: the mean agreement with
    the clusters of halves of them (Ben-Hur et al. 2002); 1: always the same. NaN where they are one cluster.

    Args:
        features: fp32 [n, D].
    """
    count = _count(len(features))
    if count < 2:
        return float("nan")
    rng, whole, found = np.random.default_rng(seed), _split(features, count), []
    for _ in range(HALVES):
        half = rng.permutation(len(features))[: len(features) // 2]
        found.append(agreement(whole[half], _split(features[half], count)))
    return float(np.mean(found))


def _count(failures: int) -> int:
    return max(1, min(MOST, failures // SIZE))


def _split(features: np.ndarray, count: int) -> np.ndarray:
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    some = np.arange(len(unit))
    if len(unit) > SAMPLE:
        some = np.sort(np.random.default_rng(0).choice(len(unit), SAMPLE, replace=False))
    of = hierarchy.fcluster(hierarchy.linkage(unit[some], "ward"), count, "maxclust") - 1
    if len(some) == len(unit):
        return np.asarray(of)
    means = np.stack([unit[some[of == k]].mean(0) for k in range(of.max() + 1)])
    # |x - m|² less |x|², which is the same for all means.
    found = ((means**2).sum(1) - 2 * unit @ means.T).argmin(1)
    found[some] = of
    return np.asarray(found)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """The adjusted Rand index of two partitions, int [n] each (Hubert and Arabie 1985): 1 if equal, about 0 by chance."""
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)
    both, rows, columns, every = (
        (counts * (counts - 1) / 2).sum() for counts in (table, table.sum(1), table.sum(0), np.array([len(one)]))
    )
    by_chance = rows * columns / every
    most = (rows + columns) / 2
    return float((both - by_chance) / (most - by_chance)) if most > by_chance else 1.0
