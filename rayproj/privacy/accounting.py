"""ε of a Poisson-subsampled Gaussian, by privacy loss distributions (dp-accounting)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache, reduce
from typing import Any

from rayproj.errors import UserError


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float, tau: float = 0.0) -> float:
    """ε at δ after `steps` updates; `tau` as in `epsilon_of`."""
    return epsilon_of([(sample_rate, noise_multiplier, steps)], delta, tau)


def epsilon_of(segments: Iterable[tuple[float, float, int]], delta: float, tau: float = 0.0) -> float:
    """ε at δ of several mechanisms together: (sample rate, noise multiplier, updates) each.

    Args:
        tau: total variation between what was run and these mechanisms, such as the probability that a bound on the batch
            was met. What lies so near to an (ε, δ')-private mechanism is (ε, δ' + (1 + e^ε) τ)-private, so ε is that at
            δ' = δ - (1 + e^ε) τ; infinite where δ does not cover it.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for rate, sigma, steps in segments:
        counts[rate, sigma] += steps
    whole = tuple(sorted((*key, n) for key, n in counts.items() if n))
    found = _epsilon(whole, delta)
    while tau:  # ε grows as δ' shrinks, and δ' shrinks as ε grows: up to the fixed point
        left = delta - (1 + math.exp(min(found, 700.0))) * tau
        if left <= 0:
            return math.inf
        if (after := _epsilon(whole, left)) <= found * (1 + 1e-6):
            return after
        found = after
    return found


@lru_cache(maxsize=4096)
def _epsilon(segments: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not segments:
        return 0.0
    # Little noise makes wide loss distributions; ten times coarser they give the same ε to 1e-4, in a tenth of the time.
    # The estimate is pessimistic at any spacing.
    spacing = 1e-3 if min(sigma for _, sigma, _ in segments) < 1 else 1e-4
    composed = [_one_update(rate, sigma, spacing).self_compose(steps) for rate, sigma, steps in segments]
    return float(reduce(lambda all_, one: all_.compose(one), composed).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _one_update(rate: float, sigma: float, spacing: float) -> Any:
    """The privacy loss distribution of one update; kept, because a run asks after each of its steps."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=rate,
        value_discretization_interval=spacing,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def noise_multiplier(target: float, sample_rate: float, steps: int, delta: float, tau: float = 0.0) -> float:
    """The least noise multiplier, to 0.1 %, whose ε does not exceed the target; `tau` as in `epsilon_of`.

    Raises:
        UserError: no sensible amount of noise reaches it.
    """
    low, high = 0.0, 1.0
    while epsilon(sample_rate, high, steps, delta, tau) > target:
        low, high = high, 2 * high
        if high > 4096:
            raise UserError(
                f"No noise multiplier below 4096 gives ε={target} after {steps} steps; take fewer or a larger ε."
            )
    while high - low > 1e-3 * high:
        middle = 0.5 * (low + high)
        if middle < 0.2 or epsilon(sample_rate, middle, steps, delta, tau) > target:
            low = middle
        else:
            high = middle
        if math.isclose(high, 0.2, rel_tol=1e-3):
            break  # below this the distributions grow past use, and so does ε
    return high
