"""Rectified flow where the exact answer is known."""

import math
from itertools import pairwise

import pytest
import torch

from rayproj.diffusion.flow import (
    SamplerConfig,
    Solver,
    guided,
    integrate,
    logit_normal,
    mixture_of_uniforms,
    noised,
    velocity_target,
)

MEAN, STD = 1.5, 0.4


def exact_velocity(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """E[noise - x0 | x_t = x] for x0 ~ N(MEAN, STD^2): both are linear in x, as for any pair of Gaussians."""
    t = t[:, None, None, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    return t / variance * centred - (MEAN + (1 - t) * STD**2 / variance * centred)


def exact_flow(noise: torch.Tensor) -> torch.Tensor:
    """The flow keeps quantiles: noise at t = 1 goes to MEAN + STD * noise at t = 0."""
    return MEAN + STD * noise


def error(solver: Solver, steps: int) -> float:
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None, None, None]
    label = torch.zeros(41, dtype=torch.long)
    found = integrate(exact_velocity, noise, label, SamplerConfig(steps, solver))
    return (found - exact_flow(noise)).square().mean().sqrt().item()


@pytest.mark.parametrize(("solver", "low", "high"), [(Solver.euler, 0.9, 1.1), (Solver.heun, 1.9, 2.4)])
def test_solvers_converge_at_their_order(solver: Solver, low: float, high: float) -> None:
    errors = [error(solver, steps) for steps in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert low < math.log2(coarse / fine) < high


def test_the_velocity_is_the_paths_derivative() -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randn(5, 2, 3, 3, dtype=torch.float64)
    t, h = torch.rand(5, dtype=torch.float64), 1e-6
    slope = (noised(x0, noise, t + h) - noised(x0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(x0, noise))
    assert torch.equal(noised(x0, noise, torch.zeros(5)), x0) and torch.equal(noised(x0, noise, torch.ones(5)), noise)


def test_guidance_extrapolates_from_the_null_label() -> None:
    def velocity(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return x * 0 + label[:, None, None, None].float()

    x, t, label = torch.zeros(3, 1, 2, 2), torch.zeros(3), torch.tensor([0, 1, 2])
    assert guided(velocity, 5, 1.0) is velocity
    found = guided(velocity, 5, 2.5)(x, t, label)[:, 0, 0, 0]
    torch.testing.assert_close(found, 5 + 2.5 * (label - 5.0))


def test_times_have_a_normal_logit() -> None:
    normals = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(logit_normal(normals, 0.3, 2.0)), 0.3 + 2.0 * normals)


def test_a_mixture_of_uniforms_has_its_weights_and_is_uniform_within() -> None:
    from scipy import stats

    pieces = [[0.0, 0.03, 1.5], [0.03, 0.6, 78.5], [0.7, 1.0, 20.0]]
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = mixture_of_uniforms(u, pieces)
    for low, high, weight in pieces:
        inside = times[(times >= low) & (times < high)]
        assert abs(len(inside) / len(u) - weight / 100) < 5 * math.sqrt(weight / 100 / len(u))
        assert stats.kstest(((inside - low) / (high - low)).numpy(), "uniform").pvalue > 1e-3
    assert not ((times > 0.6) & (times < 0.7)).any()
    assert torch.equal(mixture_of_uniforms(u, [[0.0, 1.0, 3.0]]), u)
