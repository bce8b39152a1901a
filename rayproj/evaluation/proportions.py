"""Exact statistics of failure rates. Everything is conservative: nothing is asymptotic, since failures are rare; but for
what comes in clusters there is nothing exact."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

LEAST = 10  # clusters, such as raters or prompts, of fewer than which no interval is told


@dataclass(frozen=True)
class Rate:
    """So many failures among so many images."""

    failures: int
    images: int

    def __post_init__(self) -> None:
        if not 0 <= self.failures <= self.images:
            raise ValueError(f"{self.failures} failures among {self.images} images are none.")

    @property
    def value(self) -> float:
        """The share of failures; NaN of no images."""
        return self.failures / self.images if self.images else float("nan")

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Clopper and Pearson's (1934), which covers at least `level`; (0, 1) of no images."""
        return _clopper_pearson(self.failures, self.images, level)

    def share(self) -> dict[str, float | None]:
        """Its value, None of no images, with the 95 % interval."""
        low, high = self.interval()
        return {"share": self.value if self.images else None, "low": low, "high": high}

    def described(self) -> dict[str, Any]:
        """With its 95 % interval, for a report; the rate of no images is None."""
        rate, (low, high) = self.value if self.images else None, self.interval()
        return {"failures": self.failures, "images": self.images, "rate": rate, "low": low, "high": high}


def _clopper_pearson(k: float, n: float, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low = scipy.special.betaincinv(k, n - k + 1, tail) if k > 0 else 0.0
    return float(low), float(scipy.special.betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0)


def over_clusters(hits: np.ndarray, of: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of the share Σ hits / Σ of where what is in one cluster is alike, as ratings of one rater are: Clopper and
    Pearson's at the effective number that this likeness leaves (Korn and Graubard 1998). It always has a width: where
    all say the same the number is that of the clusters, since nothing tells how alike they are.

    Args:
        hits: of each cluster, whole or not, from 0 to `of` [n].
        of: how many each has, positive [n].

    Returns:
        Its ends; None of fewer than LEAST clusters.
    """
    n, total = len(of), float(np.sum(of))
    if n < LEAST:
        return None
    share = float(np.sum(hits)) / total
    variance = n / (n - 1) * float(((hits - share * of) ** 2).sum()) / total**2
    if not 0 < share < 1:
        number = float(n)
    else:
        # Few clusters tell the variance badly, for which the degrees of freedom of Student's t make up.
        quantile = scipy.stats.t(np.array([n - 1, max(total - 1, n - 1)])).ppf((1 + level) / 2)
        number = share * (1 - share) / max(variance, 1e-12) * (quantile[1] / quantile[0]) ** 2
        number = min(number, total)
    return _clopper_pearson(share * number, number, level)


def sign_test(one: int, other: int, alternative: str = "two-sided") -> float:
    """Exact p-value of McNemar's (1947) test: in so many pairs the one alone holds, in so many the other; 1 of none."""
    return float(scipy.stats.binomtest(one, one + other, alternative=alternative).pvalue) if one + other else 1.0


def higher(of: Rate, base: Rate) -> float:
    """p of Fisher's exact test that one rate is no higher than the other, one-sided, of independent images."""
    return float(higher_each(np.array([of.failures]), np.array([of.images]), base.failures, base.images)[0])


def higher_each(failures: np.ndarray, images: np.ndarray, base_failures: Any, base_images: Any) -> np.ndarray:
    """`higher` of many rates, float64 [n], each against its base: the upper tail of the hypergeometric distribution; 1 of no
    images."""
    found = scipy.stats.hypergeom.sf(failures - 1, images + base_images, failures + base_failures, images)
    return np.where((images > 0) & (np.asarray(base_images) > 0), found, 1.0)


def power(rate: float, images: int, base_rate: float, base_images: int, level: float) -> float:
    """The chance that `higher` of two rates has p ≤ level, exactly: over all counts of failures that there may be."""
    chance, least = _rejected(images, base_rate, base_images, level)
    return float(scipy.stats.binom.sf(least - 1, images, rate) @ chance)


def detectable(images: int, base: Rate, level: float, least_ratio: float = 1.0, wanted: float = 0.8) -> float | None:
    """The least rate, in steps of 0.1 %, that with a chance of `wanted` has p ≤ level and is `least_ratio` times the base's,
    if that is as it shows; None if there is none."""
    chance, least = _rejected(images, base.value, base.images, level)
    least = np.maximum(least, np.ceil(least_ratio * base.value * images - 1e-9))

    def found(thousandths: int) -> float:
        return float(scipy.stats.binom.sf(least - 1, images, thousandths / 1000) @ chance)

    rate = bisect_left(range(1001), wanted, key=found)
    return rate / 1000 if rate <= 1000 else None


def _rejected(images: int, base_rate: float, base_images: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The chance of each count of the base's failures, and the least own ones at which p ≤ level."""
    base = np.arange(base_images + 1)
    chance = scipy.stats.binom.pmf(base, base_images, base_rate)
    base, chance = base[chance > 1e-12], chance[chance > 1e-12]  # the others have no say
    low, least = np.zeros_like(base), np.full_like(base, images + 1)
    while (low < least).any():
        middle = (low + least) // 2
        rejects = (middle <= images) & (higher_each(middle, np.full_like(base, images), base, base_images) <= level)
        low, least = np.where(rejects, low, np.minimum(middle + 1, least)), np.where(rejects, middle, least)
    return chance, least


def ratio(of: Rate, base: Rate, level: float = 0.95) -> tuple[float, float, float]:
    """How many times as high one rate is as the other, with an interval that covers at least `level`.

    The interval is of the ends of Clopper and Pearson's of both at level (1 + level) / 2, which all but (1 - level) hold at
    once (Bonferroni); it needs no failure of the base, where that of a logarithm has no end.
    """
    each = (1 + level) / 2
    (low, high), (base_low, base_high) = of.interval(each), base.interval(each)
    value = of.value / base.value if base.failures else float("inf") if of.failures else float("nan")
    return value, low / base_high, high / base_low if base_low > 0 else float("inf")


def adjusted(p: Sequence[float]) -> list[float]:
    """q of each of several tests: findings with q ≤ a have a false discovery rate of at most a (Benjamini and Hochberg
    1995), also where tests share a base, which makes them depend positively (Benjamini and Yekutieli 2001)."""
    return [float(q) for q in scipy.stats.false_discovery_control(np.asarray(p, np.float64))] if len(p) else []
