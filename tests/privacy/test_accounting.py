"""The plan and its accountant against published and independent values."""

import dataclasses
import math

import pytest

from rayproj.errors import UserError
from rayproj.privacy import accounting
from rayproj.privacy.plan import PrivacyConfig, plan


def test_golden_values_of_jax_privacy() -> None:
    """sigma = 3, T = 512, q = 0.1, delta = 1e-6: epsilon = 3.77; epsilon = 1 needs sigma = 9.66; 2 allows T = 155."""
    assert accounting.epsilon(0.1, 3.0, 512, 1e-6) == pytest.approx(3.77, abs=0.01)
    assert accounting.noise_multiplier(1.0, 0.1, 512, 1e-6) == pytest.approx(9.66, rel=2e-3)
    assert accounting.epsilon(0.1, 3.0, 155, 1e-6) <= 2 < accounting.epsilon(0.1, 3.0, 156, 1e-6)


def test_one_gaussian_release_is_the_closed_form() -> None:
    """delta(eps) = Phi(1/(2s) - eps s) - e^eps Phi(-1/(2s) - eps s) (Balle and Wang 2018, theorem 8)."""
    sigma, delta = 1.3, 1e-5
    epsilon = accounting.epsilon(1.0, sigma, 1, delta)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 1 / (2 * sigma), epsilon * sigma
    assert phi(a - b) - math.exp(epsilon) * phi(-a - b) == pytest.approx(delta, rel=1e-2)


def test_renyi_accounting_never_says_less() -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    mechanism = plan(PrivacyConfig(noise_multiplier=1.0, expected_batch=100), 5000, 100)
    accountant.compose(mechanism.event())
    assert mechanism.epsilon() <= accountant.get_epsilon(1e-5)


def test_kept_distributions_say_what_a_fresh_accountant_says() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    def update(rate: float, sigma: float) -> dp_accounting.DpEvent:
        return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(update(0.02, 1.2), 40).compose(update(0.1, 2.0), 7)
    found = accounting.epsilon_of([(0.1, 2.0, 7), (0.02, 1.2, 15), (0.02, 1.2, 25)], 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_the_unknown_is_solved_for_and_the_target_kept() -> None:
    solved = plan(PrivacyConfig(epsilon=8.0, delta=1e-5, expected_batch=100), 5000, 40)
    assert (
        solved.epsilon()
        <= 8.0
        < plan(
            PrivacyConfig(noise_multiplier=solved.noise_multiplier * 0.99, delta=1e-5, expected_batch=100), 5000, 40
        ).epsilon()
    )
    assert solved.sample_rate == 0.02 and solved.normaliser == 100
    assert solved.epsilon(10) < solved.epsilon(20) < solved.epsilon()


def test_several_segments_add_up() -> None:
    assert accounting.epsilon_of([(0.02, 1.0, 30), (0.02, 1.0, 10)], 1e-5) == accounting.epsilon(0.02, 1.0, 40, 1e-5)
    assert accounting.epsilon_of([], 1e-5) == 0
    assert accounting.epsilon_of([(0.02, 1.0, 30), (0.02, 2.0, 10)], 1e-5) < accounting.epsilon(0.02, 1.0, 40, 1e-5)


def test_a_plan_cannot_be_changed_and_every_part_is_in_its_digest() -> None:
    first = plan(PrivacyConfig(noise_multiplier=1.0, expected_batch=10), 1000, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.clip_norm = 2.0  # type: ignore[misc]
    for change in ({"clip_norm": 2.0}, {"steps": 6}, {"noise_multiplier": 1.1}, {"normaliser": 11.0}):
        assert dataclasses.replace(first, **change).digest() != first.digest()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PrivacyConfig(noise_multiplier=1.0, expected_batch=2000), "exceeds the 1000 private examples"),
        (PrivacyConfig(noise_multiplier=1.0, delta=0.01), "not below 1/1000"),
    ],
)
def test_plans_that_mean_nothing_are_refused(config: PrivacyConfig, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(config, 1000, 5)


def test_exactly_one_of_epsilon_and_noise() -> None:
    assert PrivacyConfig().problems() and PrivacyConfig(epsilon=1.0, noise_multiplier=1.0).problems()
    assert not PrivacyConfig(epsilon=1.0).problems()
    assert len(PrivacyConfig(epsilon=-1.0, clip_norm=0, multiplicity=0).problems()) == 3
