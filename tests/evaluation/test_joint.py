"""Joint log-losses against closed forms, naive loops, and samplings that are wrong in known ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import betaln, log_ndtr

from rayproj.benchmarks import testbed
from rayproj.classifiers.ensembles import Ensemble
from rayproj.evaluation import joint
from rayproj.evaluation.joint import exact_polyadic_nll, joint_nll, log_mean_exp, marginal_nll, polyadic_nll


def normal_quadrature(count: int = 20_000) -> np.ndarray:
    """Points of equal weight for z ~ N(0, 1): the middles of slices of equal mass."""
    return stats.norm.ppf((np.arange(count) + 0.5) / count)


def test_log_mean_exp_of_impossible_things() -> None:
    inf = -np.inf
    assert log_mean_exp(np.array([inf, 0, 0, 0])) == pytest.approx(math.log(3 / 4))
    assert log_mean_exp(np.array([inf, inf])) == inf
    assert log_mean_exp(np.array([-1000.0, -1000.0])) == pytest.approx(-1000)


@pytest.mark.parametrize("tau", [1, 2, 10])
def test_the_probit_index_has_a_closed_form(tau: int) -> None:
    """p(1 | z) = Φ(z), z ~ N(0, 1): the joint probability of tau ones is E[U^tau] = 1 / (tau + 1)."""
    log_p = np.repeat(log_ndtr(normal_quadrature())[:, None], tau, 1)
    assert joint_nll(log_p)[0] == pytest.approx(math.log(tau + 1), abs=1e-3)


def test_the_logistic_index_is_gauss_hermite() -> None:
    """E[sigmoid(z)^2] = .2933790359 and E[sigmoid(z)^10] = .0289785645."""
    log_p = np.repeat(-np.log1p(np.exp(-normal_quadrature()))[:, None], 10, 1)
    assert joint_nll(log_p, 2) == pytest.approx([1.2262899] * 5, abs=1e-4)
    assert joint_nll(log_p)[0] == pytest.approx(3.5411989, abs=1e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_gaussian_process_classification(correlation: float) -> None:
    """A probit likelihood over a Gaussian process: the joint probability is that of an orthant (Rasmussen and Williams 2006,
    section 3.9), of two points 1/4 + arcsin(ρ) / 2π in closed form."""
    cov = np.array([[2.0, 2 * correlation, 0.3], [2 * correlation, 2.0, 0.1], [0.3, 0.1, 0.7]])
    sobol = stats.qmc.MultivariateNormalQMC(np.zeros(3), cov, seed=0).random(2**14)
    log_p = log_ndtr(sobol)
    rho = 2 * correlation / 3
    assert np.exp(-joint_nll(log_p[:, :2])[0]) == pytest.approx(0.25 + math.asin(rho) / (2 * math.pi), abs=2e-3)
    orthant = stats.multivariate_normal(cov=cov + np.eye(3)).cdf(np.zeros(3))
    assert np.exp(-joint_nll(log_p)[0]) == pytest.approx(orthant, abs=2e-3)


def coins(tau: int, kappa: int) -> tuple[np.ndarray, np.ndarray]:
    """Bayesian inference of coins of which n tosses were seen, each with a uniform prior: log p of heads for quadrature
    points of the posteriors (Sobol'), [Z, kappa], and the exact polyadic NLL of heads, by the Beta function."""
    seen = [(1, 4), (7, 2), (0, 0)][:kappa]
    u = stats.qmc.Sobol(kappa, seed=1).random(2**14)
    log_p = np.log(np.stack([stats.beta.ppf(u[:, k], 1 + h, 1 + t) for k, (h, t) in enumerate(seen)], 1))
    exact = 0.0
    for draws in product(range(kappa), repeat=tau):
        counts = np.bincount(draws, minlength=kappa)
        exact -= sum(betaln(1 + h + c, 1 + t) - betaln(1 + h, 1 + t) for (h, t), c in zip(seen, counts, strict=True))
    return log_p, np.array([exact / kappa**tau])


@pytest.mark.parametrize(("tau", "kappa"), [(1, 1), (3, 1), (4, 2), (10, 2), (5, 3)])
def test_polyadic_sampling_of_conjugate_coins(tau: int, kappa: int) -> None:
    log_p, exact = coins(tau, kappa)
    assert exact_polyadic_nll(log_p, tau, kappa) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(
    ("p", "expected"),
    [([[0.9, 0.1], [0.1, 0.9]], 9.8536113), ([[0.9, 0.9], [0.1, 0.1]], 1.7467523), ([[0.5, 0.5]], 10 * math.log(2))],
)
def test_dyadic_values(p: list[list[float]], expected: float) -> None:
    assert exact_polyadic_nll(np.log(np.array(p))) == pytest.approx([expected])


def test_a_coin_that_is_known_up_to_a_flip() -> None:
    """Joint log 2 whatever tau is; the product of marginals tau log 2. What is impossible and does not come does no harm."""
    with np.errstate(divide="ignore"):
        log_p = np.log(np.array([[1.0] * 10, [0.0] * 10]))
    assert joint_nll(log_p)[0] == pytest.approx(math.log(2))
    assert marginal_nll(log_p).sum() == pytest.approx(10 * math.log(2))
    assert np.isfinite(exact_polyadic_nll(log_p)).all()


def test_against_a_naive_loop() -> None:
    log_p = np.log(np.random.default_rng(0).uniform(0.05, 1, (7, 23)))
    expected = [-math.log(np.mean([math.prod(np.exp(row[i : i + 4])) for row in log_p])) for i in range(0, 20, 4)]
    assert joint_nll(log_p, 4) == pytest.approx(expected)
    assert marginal_nll(log_p) == pytest.approx(-np.log(np.exp(log_p).mean(0)))
    chosen = joint.anchors(23, 10, 2, seed=3)
    assert chosen.shape == (11, 10) and set((chosen // 2 - np.arange(11)[:, None]).flat) == {0}
    expected = [-math.log(np.mean([math.prod(math.exp(row[i]) for i in drawn) for row in log_p])) for drawn in chosen]
    assert polyadic_nll(log_p, seed=3) == pytest.approx(expected)


def test_what_the_losses_reduce_to() -> None:
    log_p = np.log(np.random.default_rng(1).uniform(0.05, 1, (5, 40)))
    assert polyadic_nll(log_p, tau=1, kappa=1) == pytest.approx(marginal_nll(log_p))
    assert exact_polyadic_nll(log_p, tau=1) == pytest.approx(marginal_nll(log_p).reshape(-1, 2).mean(1))
    same = np.repeat(log_p[:1], 5, 0)
    assert joint_nll(same)[0] == pytest.approx(marginal_nll(same).sum())
    assert exact_polyadic_nll(same, 10) == pytest.approx(10 * marginal_nll(same).reshape(-1, 2).mean(1))


Sampling = Callable[[int, int, int, int], np.ndarray]


def sampling_is_dyadic(sampling: Sampling, tau: int = 10, kappa: int = 2) -> None:
    """Its losses average to the exact value, and depend on the examples' places alone."""
    rng = np.random.default_rng(2)
    # Indices that disagree on all anchors alike, or on each by itself: both kinds of dependence weigh.
    shared, own = rng.normal(0, 1.5, (40, 1, 1)), rng.normal(0, 1.5, (40, 2000, 2))
    log_p = -np.log1p(np.exp(-(shared + own + [1.0, -1.0]).reshape(40, 4000)))
    groups = log_p.shape[1] // kappa
    exact = exact_polyadic_nll(log_p, tau, kappa)
    differences = np.concatenate(
        [-log_mean_exp(log_p[:, sampling(4000, tau, kappa, s)].sum(2)) - exact for s in range(4)]
    )
    error = differences.std() / math.sqrt(len(differences))
    assert len(differences) == 4 * groups and abs(differences.mean()) < 4 * error, "not the exact value on average"


def test_the_sampling_is_right() -> None:
    sampling_is_dyadic(joint.anchors)
    sampling_is_dyadic(joint.anchors, tau=4, kappa=4)


def without_replacement(n: int, tau: int, kappa: int, seed: int) -> np.ndarray:
    """Half of the draws from each anchor."""
    return np.arange(n // kappa)[:, None] * kappa + np.arange(tau) % kappa


WRONG: dict[str, Sampling] = {
    "tau too small": lambda n, tau, kappa, seed: joint.anchors(n, tau - 1, kappa, seed),
    "tau too large": lambda n, tau, kappa, seed: joint.anchors(n, tau + 1, kappa, seed),
    "one anchor": lambda n, tau, kappa, seed: joint.anchors(n, tau, kappa, seed) // kappa * kappa,
    "kappa too large": lambda n, tau, kappa, seed: joint.anchors(n, tau, 2 * kappa, seed).repeat(2, 0),
    "without replacement": without_replacement,
    "unfair": lambda n, tau, kappa, seed: np.maximum(
        joint.anchors(n, tau, kappa, seed), joint.anchors(n, tau, kappa, seed + 9)
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sampling_is_caught(wrong: Sampling) -> None:
    with pytest.raises(AssertionError, match="not the exact value"):
        sampling_is_dyadic(wrong)


def test_the_draws_are_of_places_not_of_labels() -> None:
    assert np.array_equal(joint.anchors(100, 10, 2, 0)[:20], joint.anchors(40, 10, 2, 0))
    assert not np.array_equal(joint.anchors(40, 10, 2, 0), joint.anchors(40, 10, 2, 1))


def test_labels_that_are_thought_impossible_count_as_the_worst_that_is_not() -> None:
    truth, found = np.log([0.5, 0.5, 0.9, 0.9]), np.log([0.5, 0.25, 0.3, 0.9])
    found[3] = -np.inf
    value, finite = joint.divergence(truth, found)
    assert finite == 0.75 and value == pytest.approx((0 + math.log(2) + 2 * math.log(3)) / 4)
    assert joint.divergence(truth, np.full(4, -np.inf)) == (math.inf, 0.0)


def test_in_the_testbed_the_truth_is_no_way_from_itself_and_an_agent_is() -> None:
    problem = testbed.Problem(2, 20, 0.1, 0)
    torch.manual_seed(problem.seed)
    truth = testbed.Perceptron(problem.dimensions)
    truth.head.weight.data /= problem.temperature
    truth.head.bias.data /= problem.temperature
    for tau in (1, 10):
        assert testbed.gap(Ensemble([truth]), problem, tau) == (pytest.approx(0, abs=1e-4), 1.0)
        gap, possible = testbed.gap(testbed.trained("base", problem), problem, tau)
        assert gap > 0.1 and possible == 1.0
    x, log_p = problem.examples(4000, "training")
    labels = testbed.drawn(log_p, torch.rand(4000, generator=torch.Generator().manual_seed(0)).double())
    assert float((labels == 1).double().mean()) == pytest.approx(float(log_p.exp()[:, 1].mean()), abs=0.03)
    assert x.std().item() == pytest.approx(1, abs=0.05)


def test_a_bernoulli_testbed_has_its_divergence() -> None:
    """The mean joint NLL less that of the truth is the KL divergence of the joint predictions, here of products."""
    rng, tau, n = np.random.default_rng(3), 5, 200_000
    for truth, model in [(0.01, 0.05), (0.1, 0.2), (0.5, 0.4)]:
        heads = rng.random(n) < truth
        nll = partial(joint_nll, tau=tau)
        losses = [nll(np.log(np.where(heads, p, 1 - p))[None]) for p in (model, truth)]
        kl = truth * math.log(truth / model) + (1 - truth) * math.log((1 - truth) / (1 - model))
        assert (losses[0] - losses[1]).mean() == pytest.approx(tau * kl, abs=0.01)
