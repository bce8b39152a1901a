"""The Fréchet distance between Gaussians fitted to two sets of features (Dowson and Landau 1982; Heusel et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class FeatureStatistics:
    """Sums over features [n, d] in float64; those of parts add up to that of the whole."""

    n: int
    total: np.ndarray  # [d]
    outer: np.ndarray  # [d, d]: sum of x x^T

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureStatistics:
        x = np.asarray(features, np.float64)
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(self.n + other.n, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased."""
        return (self.outer - self.n * np.outer(self.mean, self.mean)) / (self.n - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric: it is stable where the covariances
    are singular, as with fewer samples than dimensions. The estimate is biased upwards by about c/n: compare at equal n.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second.covariance @ root)
    trace_root = np.sqrt(np.clip(cross, 0, None)).sum()
    shift = first.mean - second.mean
    return float(shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_root)
