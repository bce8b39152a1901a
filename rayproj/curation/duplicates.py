"""Near duplicates: clusters of images that are alike, and weights that keep a cluster from being learned by heart.

Imagen 3 (arXiv 2408.07009, section 2) removes duplicates and down-weights similar images, which limits how much a model
overfits to particular elements of its training data.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from rayproj.data.encodings import luminance

BLOCK = 2048  # rows of the matrix of similarities at a time


def clusters(*alike: tuple[np.ndarray, float]) -> np.ndarray:
    """Number of each image's cluster, int [n]: images belong together if a chain of pairs joins them.

    Args:
        alike: features [n, d] and the cosine from which two images are a pair; any of them may say so.
    """
    pairs = [_pairs(features, similarity) for features, similarity in alike]
    i, j = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    n = len(alike[0][0])
    graph = coo_matrix((np.ones(len(i), bool), (i, j)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _pairs(features: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows, columns = [], []
    for start in range(0, len(unit), BLOCK):
        # The later one of a pair alone: half of the matrix.
        i, j = np.nonzero(unit[start : start + BLOCK] @ unit[start:].T >= similarity)
        rows.append(i + start)
        columns.append(j + start)
    return np.concatenate(rows), np.concatenate(columns)


def difference_hash(images: np.ndarray) -> np.ndarray:
    """±1 [n, 64] of uint8 [n, C, H, W]: whether the luminance grows from one to the next of 9x8 fields (dHash, Krawetz
    2013). Two that differ in k bits have the cosine 1 - k/32."""
    fields = [
        np.asarray(Image.fromarray(y.round().astype(np.uint8)).resize((9, 8), Image.Resampling.BOX), np.int64)
        for y in luminance(images)
    ]
    x = np.stack(fields)
    return np.where(x[:, :, 1:] > x[:, :, :-1], 1.0, -1.0).reshape(len(x), 64).astype(np.float32)


def weights(cluster: np.ndarray, power: float) -> np.ndarray:
    """Of each image, float [n]: those of a cluster of k images sum to k^power. 0: a cluster counts as one image; 1: images
    count alike."""
    sizes = np.bincount(cluster)
    return sizes[cluster].astype(np.float64) ** (power - 1)
