import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rayproj.robustness.threats import Norm, Threat, project_l1, size

EPS = {Norm.linf: 0.1, Norm.l2: 0.7, Norm.l1: 2.0}
ROW = torch.tensor([[3, 0, 0], [4, 0, 0]])


def images(seed: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", list(Norm))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), far=st.floats(0.01, 30))
def test_projected_points_lie_in_ball_and_box_and_stay_there(norm: Norm, seed: int, far: float) -> None:
    threat, x = Threat(norm, EPS[norm]), images(seed)
    z = threat.project(x, x + far * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    assert threat.holds(x, z, 1e-6).all() and z.min() >= 0 and z.max() <= 1
    torch.testing.assert_close(threat.project(x, z), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_the_l1_projection_is_the_nearest_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice([0.0, 1.0, 0.3, 0.9], 8) if seed % 3 == 0 else rng.random(8)
    u, eps = rng.normal(0, rng.choice([0.1, 1, 3]), 8), rng.uniform(0.05, 2)
    found = project_l1(torch.tensor(u)[None], torch.tensor(x)[None], eps)[0].numpy()
    # |δ| = a - b, both positive, makes it a smooth program.
    limits = [(0, 1 - v) for v in x] + [(0, v) for v in x]
    best = minimize(
        lambda s: ((s[:8] - s[8:] - u) ** 2).sum(), np.zeros(16), bounds=limits, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda s: eps - s.sum()}, options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    np.testing.assert_allclose(found, best.x[:8] - best.x[8:], atol=2e-5)
    assert np.abs(found).sum() <= eps + 1e-9


@pytest.mark.parametrize("norm", list(Norm))
def test_starts_are_in_the_ball_and_go_by_the_row(norm: Norm) -> None:
    threat, x = Threat(norm, EPS[norm]), images(1)
    both = threat.start(x, ROW, 7)
    assert threat.holds(x, both).all()
    assert torch.equal(threat.start(x[1:], ROW[1:], 7), both[1:])
    assert not torch.equal(threat.start(x, ROW + torch.tensor([0, 1, 0]), 7), both)
    if norm is Norm.linf:  # one value is at the edge, unless the box is before it
        inside = torch.full_like(x, 0.5)
        torch.testing.assert_close(size(threat.start(inside, ROW, 7) - inside, norm), torch.full((2,), EPS[norm]))


def test_what_is_outside_or_no_number_is_not_held() -> None:
    threat, x = Threat(Norm.l2, 0.5), torch.full((3, 1, 2, 2), 0.9)
    z = x.clone()
    z[0] += 0.3  # leaves the box
    z[1] -= 0.3  # leaves the ball
    z[2, 0, 0, 0] = torch.nan
    assert threat.holds(x, z).tolist() == [False, False, False] and threat.holds(x, x).all()
