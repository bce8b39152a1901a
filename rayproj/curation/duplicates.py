"""Near duplicates: clusters of images that are alike, and weights that keep a cluster from being learned by heart.

Imagen 3 (arXiv 2408.07009, section 2) removes duplicates and down-weights similar images, which limits how much a model
overfits to particular elements of its training data.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

BLOCK = 2048  # rows of the matrix of similarities at a time


def clusters(features: np.ndarray, similarity: float) -> np.ndarray:
    """Number of each image's cluster, int [n]: images belong together if a chain of pairs with at least this cosine joins
    them. Of features [n, d]."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows, columns = [], []
    for start in range(0, len(unit), BLOCK):
        # The later one of a pair alone: half of the matrix.
        i, j = np.nonzero(unit[start : start + BLOCK] @ unit[start:].T >= similarity)
        rows.append(i + start)
        columns.append(j + start)
    i, j = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(i), bool), (i, j)), shape=(len(unit), len(unit)))
    return connected_components(graph, directed=False)[1]


def weights(cluster: np.ndarray, power: float) -> np.ndarray:
    """Of each image, float [n]: those of a cluster of k images sum to k^power. 0: a cluster counts as one image; 1: images
    count alike."""
    sizes = np.bincount(cluster)
    return sizes[cluster].astype(np.float64) ** (power - 1)
