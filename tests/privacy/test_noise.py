"""Noise and Poisson sampling: the distributions that the accountant assumes, equal at any world size."""

import numpy as np
import torch
from scipy import stats

from rayproj.privacy.noise import gaussian
from rayproj.privacy.sampling import PoissonSampling
from tests.support import checks

KEY = bytes(range(16))


def test_noise_is_gaussian_and_every_coordinate_its_own() -> None:
    checks.noise_is_gaussian(gaussian)


def test_the_same_at_any_partition() -> None:
    whole = gaussian(KEY, 3, 1, range(0, 1000))
    for size in (1, 7, 250, 333):
        parts = [gaussian(KEY, 3, 1, range(i, min(i + size, 1000))) for i in range(0, 1000, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_steps_starts_and_keys_are_independent() -> None:
    checks.noises_are_independent(gaussian)


def test_inclusion_is_poisson() -> None:
    checks.inclusion_is_poisson()


def test_the_draw_depends_on_step_and_key_alone() -> None:
    assert np.array_equal(PoissonSampling(99, 0.3, KEY).indices(5), PoissonSampling(99, 0.3, KEY).indices(5))
    assert not np.array_equal(PoissonSampling(99, 0.3, KEY).indices(5), PoissonSampling(99, 0.3, KEY).indices(6))
    assert not np.array_equal(PoissonSampling(99, 0.3, KEY).indices(5), PoissonSampling(99, 0.3, KEY[::-1]).indices(5))
    assert any(len(PoissonSampling(20, 0.01, KEY).indices(step)) == 0 for step in range(20))


def test_with_a_bound_a_larger_draw_becomes_a_uniform_subset_of_that_size() -> None:
    """Below the bound nothing changes; at it every example is as likely as any other."""
    free, bounded = PoissonSampling(50, 0.3, KEY), PoissonSampling(50, 0.3, KEY, max_batch=15)
    counts, met = np.zeros(50), 0
    for step in range(4000):
        whole, found = free.indices(step), bounded.indices(step)
        if len(whole) <= 15:
            assert np.array_equal(whole, found)
        else:
            assert len(found) == 15 == len(set(found))
            counts[found] += 1
            met += 1
    assert met > 1000
    expected = met * 15 / 50
    # Negatively correlated within a draw, so that the statistic is chi-square times (1 - 15/50).
    statistic = ((counts - expected) ** 2).sum() / expected / (1 - 15 / 50)
    assert stats.chi2.sf(statistic, 49) > 1e-4
