"""The plan and its accountant against published and independent values."""

import dataclasses
import math
from fractions import Fraction

import pytest

from rayproj.errors import UserError
from rayproj.privacy import accounting
from rayproj.privacy.plan import PrivacyConfig, plan


def test_golden_values_of_jax_privacy() -> None:
    """sigma = 3, T = 512, q = 0.1, delta = 1e-6: epsilon = 3.77; epsilon = 1 needs sigma = 9.66; 2 allows T = 155."""
    assert accounting.epsilon(0.1, 3.0, 512, 1e-6) == pytest.approx(3.77, abs=0.01)
    assert accounting.noise_multiplier(1.0, 0.1, 512, 1e-6) == pytest.approx(9.66, rel=2e-3)
    assert accounting.epsilon(0.1, 3.0, 155, 1e-6) <= 2 < accounting.epsilon(0.1, 3.0, 156, 1e-6)


@pytest.mark.parametrize(
    ("segments", "delta"),
    [
        ([(0.1, 3.0, 512)], 1e-6),
        ([(0.01, 0.8, 1000)], 1e-5),
        ([(0.3, 2.0, 60)], 1e-3),
        ([(0.001, 0.6, 5000)], 1e-7),
        ([(0.1, 2.0, 30), (0.02, 1.2, 400)], 1e-5),
    ],
)
def test_it_lies_within_the_bounds_of_opacus_prv(segments: list[tuple[float, float, int]], delta: float) -> None:
    """Composition by FFT, with proven bounds on its error (Gopi et al. 2021, arXiv 2106.02848), here ±0.01 in ε."""
    from opacus.accountants.prv import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps) for rate, sigma, steps in segments]
    distribution = accountant._get_dprv(eps_error=0.01, delta_error=delta / 1000)
    lower, _, upper = distribution.compute_epsilon(delta, delta / 1000, 0.01)
    assert lower <= accounting.epsilon_of(segments, delta) <= upper < lower + 0.021


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


ANY_THREE = {"epsilon": 4.0, "noise_multiplier": 1.1, "expected_batch": 100}


def test_any_one_unknown_is_solved_for() -> None:
    """The largest batch, and the most steps, whose ε does not exceed the target: one more of either does."""
    most = plan(PrivacyConfig(**ANY_THREE), 5000, steps=0)  # type: ignore[arg-type]
    assert most.epsilon() <= 4.0 < accounting.epsilon(0.02, 1.1, most.steps + 1, 1e-5) and most.steps > 10
    largest = plan(PrivacyConfig(**ANY_THREE | {"expected_batch": 0}), 5000, steps=300)  # type: ignore[arg-type]
    assert largest.normaliser == 5000 * largest.sample_rate
    next_rate = (largest.normaliser + 1) / 5000
    assert largest.epsilon() <= 4.0 < accounting.epsilon(next_rate, 1.1, 300, 1e-5)
    with pytest.raises(UserError, match="Even a single update"):
        plan(PrivacyConfig(**ANY_THREE | {"noise_multiplier": 0.3}), 5000, steps=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 10), ({"epsilon": None}, 0), ({"epsilon": None, "expected_batch": 0}, 10), ({"expected_batch": 0}, 0)],
)
def test_three_of_four_must_be_given(changes: dict, steps: int) -> None:
    with pytest.raises(UserError, match=r"three must be given, and the fourth follows; [24] are"):
        plan(PrivacyConfig(**ANY_THREE | changes), 5000, steps)


def test_a_bound_on_the_batch_costs_what_total_variation_costs() -> None:
    """τ is the probability of a batch beyond the bound in any step; (ε, δ') at distance τ is (ε, δ' + (1 + e^ε) τ)."""
    config = PrivacyConfig(noise_multiplier=1.0, delta=1e-5, expected_batch=100, max_batch=170)
    free, bounded = plan(dataclasses.replace(config, max_batch=0), 5000, 50), plan(config, 5000, 50)
    terms = [float(math.comb(5000, k) * Fraction(1, 50) ** k * Fraction(49, 50) ** (5000 - k)) for k in range(171, 250)]
    tau = 50 * sum(terms)
    assert bounded.overflow == pytest.approx(sum(terms), rel=1e-6) and free.overflow == 0
    assert bounded.epsilon() > free.epsilon()
    left = 1e-5 - (1 + math.exp(bounded.epsilon())) * tau
    assert accounting.epsilon(0.02, 1.0, 50, left) == pytest.approx(bounded.epsilon(), rel=1e-4)
    solved = plan(dataclasses.replace(config, noise_multiplier=None, epsilon=3.0), 5000, 50)
    assert solved.epsilon() <= 3.0 and solved.noise_multiplier > 0
    with pytest.raises(UserError, match=r"max_batch=110 would be met with a probability of .*raise it"):
        plan(dataclasses.replace(config, max_batch=110), 5000, 50)


def test_what_no_plan_can_be_made_of() -> None:
    assert PrivacyConfig().problems() and not PrivacyConfig(epsilon=1.0).problems()
    assert len(PrivacyConfig(epsilon=-1.0, clip_norm=0, multiplicity=0, max_batch=-1).problems()) == 4
