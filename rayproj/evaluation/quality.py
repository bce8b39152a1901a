"""How near a set of images is to another, in the features [n, d] of a network: several measures, which see different faults
and are reported together. Imagen 3 (arXiv 2408.07009, section 5) found them in trade-off, and none of them enough alone.

All of them depend on the number of images: compare sets at equal n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rayproj.evaluation.frechet import FeatureStatistics, frechet_distance

BLOCK = 1024  # rows of a matrix of distances at a time
NEIGHBOURS = 5  # k of precision, recall, density and coverage, as in Naeem et al. 2020
RBF = 10.0  # bandwidth of the Gaussian kernel, as in CMMD (Jayasumana et al. 2024, arXiv 2401.09603)
SUBSETS, SUBSET = 50, 1000  # of the kernel distance: draws, and images of each (Binkowski et al. 2018: 100 of 1000)


def quality(reference: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """All measures of `found` [n, d] against `reference` [m, d]."""
    kid, error = kernel_distance(reference, found)
    return {
        "frechet_distance": frechet_distance(FeatureStatistics.of(reference), FeatureStatistics.of(found)),
        "frechet_distance_limit": frechet_limit(reference, found),
        "kernel_distance": kid,
        "kernel_distance_error": error,
        "mmd": gaussian_mmd(reference, found),
        **prdc(reference, found),
    }


def by_cell(
    reference: np.ndarray, reference_cells: Sequence[str], found: np.ndarray, cells: Sequence[str], least: int = 30
) -> dict[str, Any]:
    """Measures within each cell, such as a class of one group: a generator may draw one worse than the others, which the
    whole does not show. The kernel distance is unbiased; recall and coverage, which depend on the number of images, are of
    as many in each cell and on both sides.

    Args:
        reference, found: features [m, d] and [n, d].
        reference_cells, cells: the cell of each.
        least: cells with fewer images, in either set, are left out.

    Returns:
        "cells": by name "images", "kernel_distance", "recall" and "coverage"; "compared": images of the latter two;
        "left_out": names; "worst": of the largest kernel distance, None without cells.
    """
    there, here = np.asarray(reference_cells, str), np.asarray(cells, str)
    names = sorted({*there.tolist(), *here.tolist()})
    both = {name: (reference[there == name], found[here == name]) for name in names}
    both = {name: pair for name, pair in both.items() if min(map(len, pair)) >= least}
    equal, rng = min((len(part) for pair in both.values() for part in pair), default=0), np.random.default_rng(0)
    measured: dict[str, dict[str, float]] = {}
    for name, (a, b) in both.items():
        spread = prdc(*(part[rng.permutation(len(part))[:equal]] for part in (a, b)))
        measured[name] = {
            "images": len(b),
            "kernel_distance": kernel_distance(a, b)[0],
            "recall": spread["recall"],
            "coverage": spread["coverage"],
        }
    worst = max(measured, key=lambda name: measured[name]["kernel_distance"], default=None)
    left_out = [name for name in names if name not in measured]
    return {"cells": measured, "compared": equal, "left_out": left_out, "worst": worst}


def limit_takes(dimensions: int) -> int:
    """How many images of each set `frechet_limit` takes in features of so many dimensions."""
    return 2 * dimensions


def frechet_limit(first: np.ndarray, second: np.ndarray, points: int = 6, seed: int = 0) -> float | None:
    """The Fréchet distance at infinitely many images: the estimate is biased upwards by about c/n, so it is what a straight
    line through estimates at several n has at 1/n = 0 (Chong and Forsyth 2020, arXiv 1911.07023).

    Returns:
        None with fewer than twice as many images as features: the line is not straight there.
    """
    n = min(len(first), len(second))
    if n < limit_takes(first.shape[1]):
        return None
    rng = np.random.default_rng(seed)
    sizes = np.linspace(n // 2, n, points).astype(int)
    values = []
    for size in sizes:
        parts = (FeatureStatistics.of(rng.permutation(x)[:size]) for x in (first, second))
        values.append(frechet_distance(*parts))
    return float(np.polyfit(1 / sizes, values, 1)[1])


def kernel_distance(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float | None]:
    """The unbiased squared MMD with the kernel (x·y/d + 1)³ (Binkowski et al. 2018, arXiv 1801.01401; over Inception's
    features it is KID), and its standard error, over random subsets of the images.

    Returns:
        The error is None where there are too few images for more than one subset.
    """
    size = min(SUBSET, len(first), len(second))
    draws = SUBSETS if size < min(len(first), len(second)) else 1
    rng, d = np.random.default_rng(seed), first.shape[1]
    values = []
    for _ in range(draws):
        x, y = (rng.permutation(len(a))[:size] for a in (first, second))
        a, b = np.asarray(first[x], np.float64), np.asarray(second[y], np.float64)
        values.append(_unbiased(*((u @ v.T / d + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))))
    return float(np.mean(values)), float(np.std(values, ddof=1) / draws**0.5) if draws > 1 else None


def _unbiased(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """Of kernel matrices [n, n] each; Gretton et al. 2012, eq. 3."""
    n = len(xx)
    return float((xx.sum() + yy.sum() - np.trace(xx) - np.trace(yy)) / (n * (n - 1)) - 2 * xy.mean())


def gaussian_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """1000 times the squared MMD of unit-length features with a Gaussian kernel of bandwidth 10, biased, as in the code of
    Jayasumana et al. 2024; over CLIP's features it is CMMD."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(first, np.float64), second))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        total = sum(np.exp(-rows / (2 * RBF**2)).sum() for rows in squared_distances(x, y))
        return float(total) / (len(x) * len(y))

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def prdc(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv
    2002.09797), of balls around each image that reach its k-th nearest neighbour of the same set."""
    k = min(k, len(real) - 1, len(fake) - 1)
    of_real, of_fake = _radii(real, k), _radii(fake, k)
    inside, recalled = np.zeros(len(fake)), np.zeros(len(real), bool)
    nearest = np.full(len(real), np.inf)
    for start, rows in zip(range(0, len(fake), BLOCK), squared_distances(fake, real), strict=True):
        part = slice(start, start + len(rows))
        inside[part] = (rows <= of_real).sum(1)
        recalled |= (rows <= of_fake[part, None]).any(0)
        nearest = np.minimum(nearest, rows.min(0))
    return {
        "precision": float((inside > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(inside.mean() / k),
        "coverage": float((nearest <= of_real).mean()),
    }


def memorisation(train: np.ndarray, test: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Whether images lie nearer to those that a model learned from than new images of the same kind do.

    Returns:
        "authenticity": share of images that are farther from their nearest training image than that one is from its own
        nearest neighbour (Alaa et al. 2022, arXiv 2102.08921, section 4.3); "copying": z-score of the Mann-Whitney test that
        they are as far from the training images as test images are, below -2 where they are nearer (Meehan et al. 2020,
        arXiv 2004.05675, eq. 1, with one cell); "nearest": the median distance, over that of the test images.
    """
    from scipy.stats import mannwhitneyu

    between = _radii(train, 1)
    distance, place = nearest(fake, train)
    of_test, _ = nearest(test, train)
    n, m = len(distance), len(of_test)
    u = mannwhitneyu(distance, of_test).statistic
    return {
        "authenticity": float((distance > between[place]).mean()),
        "copying": float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)),
        "nearest": float(np.sqrt(np.median(distance) / np.median(of_test))),
    }


def nearest(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance of each of x [n, d] to its nearest of y [m, d], and which that is."""
    pairs = [(rows.min(1), rows.argmin(1)) for rows in squared_distances(x, y)]
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance [n] of each to its k-th nearest neighbour, itself apart."""
    return np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in squared_distances(x, x)])


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Of x [n, d] to y [m, d], in blocks [BLOCK, m] of rows, float64; an image is at no distance from itself."""
    y = np.asarray(y, np.float64)
    lengths = np.einsum("ij,ij->i", y, y)
    for start in range(0, len(x), BLOCK):
        a = np.asarray(x[start : start + BLOCK], np.float64)
        found = np.einsum("ij,ij->i", a, a)[:, None] + lengths - 2 * (a @ y.T)
        # What is left of equal rows after rounding must not make one of them a neighbour of the other before itself.
        yield np.where(found <= 1e-12 * lengths, 0.0, found)
