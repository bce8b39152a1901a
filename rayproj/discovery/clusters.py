"""Failures that are alike: the same wrong answer, and similar features."""

from __future__ import annotations

import numpy as np
from scipy.cluster import hierarchy

SIZE, MOST = 12, 6  # failures of a cluster, about; clusters of one wrong answer, at most
HALVES = 10  # by which stability is measured


def clusters(answers: np.ndarray, features: np.ndarray | None, size: int = SIZE) -> np.ndarray:
    """The cluster of each failure, int64 [n]: by wrong answer, and then by Ward's agglomeration of the features at length
    one, which has no randomness.

    Args:
        answers: int [n], the wrong classes.
        features: fp32 [n, D]; None: the wrong answer alone counts.
        size: of a cluster, about, which tells how many there are.
    """
    found, number = np.zeros(len(answers), np.int64), 0
    for answer in np.unique(answers):
        of = np.flatnonzero(answers == answer)
        count = min(MOST, len(of) // size)
        if features is not None and count > 1:
            unit = features[of] / np.maximum(np.linalg.norm(features[of], axis=1, keepdims=True), 1e-12)
            found[of] = number + hierarchy.fcluster(hierarchy.linkage(unit, "ward"), count, "maxclust") - 1
        else:
            found[of] = number
        number += max(1, count)
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def stability(answers: np.ndarray, features: np.ndarray | None, seed: int = 0) -> float:
    """How far the clusters hang on the failures that happened to be seen: the mean agreement of the clusters with those of
    halves of the failures (Ben-Hur et al. 2002); 1: always the same.

    NaN of fewer than four failures, or without features: then the clusters are the wrong answers themselves.
    """
    if len(answers) < 4 or features is None:
        return float("nan")
    rng, whole, found = np.random.default_rng(seed), clusters(answers, features), []
    for _ in range(HALVES):
        half = rng.permutation(len(answers))[: len(answers) // 2]
        of_half = clusters(answers[half], features[half], SIZE // 2)
        found.append(agreement(whole[half], of_half))
    return float(np.mean(found))


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
