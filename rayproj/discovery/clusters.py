"""Failures that are alike: the same wrong answer, and similar features."""

from __future__ import annotations

import numpy as np
from scipy.cluster import hierarchy

SIZE, MOST = 12, 6  # failures of a cluster, about; clusters of one wrong answer, at most


def clusters(answers: np.ndarray, features: np.ndarray | None) -> np.ndarray:
    """The cluster of each failure, int64 [n]: by wrong answer, and then by Ward's agglomeration of the features at length
    one, which has no randomness.

    Args:
        answers: int [n], the wrong classes.
        features: fp32 [n, D]; None: the wrong answer alone counts.
    """
    found, number = np.zeros(len(answers), np.int64), 0
    for answer in np.unique(answers):
        of = np.flatnonzero(answers == answer)
        count = min(MOST, len(of) // SIZE)
        if features is not None and count > 1:
            unit = features[of] / np.maximum(np.linalg.norm(features[of], axis=1, keepdims=True), 1e-12)
            found[of] = number + hierarchy.fcluster(hierarchy.linkage(unit, "ward"), count, "maxclust") - 1
        else:
            found[of] = number
        number += max(1, count)
    return np.unique(found, return_inverse=True)[1].astype(np.int64)
