"""Poisson sampling, keyed by step: the draw that the accountant assumes, equal on every rank, with nothing to save."""

from __future__ import annotations

import hashlib

import numpy as np


class PoissonSampling:
    """Every example takes part in every step with probability q, independently of everything.

    Drawn as a binomial size and a uniform subset of that size, which is the same distribution in O(batch).

    Args:
        key: 16 secret bytes; who knows them knows who took part, and the amplification by sampling is void.
        max_batch: of more examples as many take part; 0: no bound. The plan accounts for it.
    """

    def __init__(self, num_samples: int, sample_rate: float, key: bytes, max_batch: int = 0) -> None:
        self.num_samples, self.sample_rate, self.key = num_samples, sample_rate, key
        self.max_batch = max_batch or num_samples

    def indices(self, step: int) -> np.ndarray:
        """int64, ascending: the examples of update `step`; possibly none."""
        digest = hashlib.blake2b(f"poisson/{step}".encode(), key=self.key, digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        size = min(rng.binomial(self.num_samples, self.sample_rate), self.max_batch)
        return np.sort(rng.choice(self.num_samples, size, replace=False, shuffle=False)).astype(np.int64)
