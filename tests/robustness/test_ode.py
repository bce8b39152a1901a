import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from rayproj.robustness.ode import StableODE, regularisers, runge_kutta, simplex
from rayproj.robustness.oracle import OfUnit


class Network(nn.Module):
    """Features of images in [0, 255] that are in clusters by class, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 12), nn.Linear(12, 4)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.flatten(1) / 255)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.pooled(x))


@pytest.fixture(scope="module")
def clean():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    label = torch.arange(200) % 4
    corners = torch.rand(4, 1, 4, 4).round()
    x = (0.1 + 0.8 * corners[label] + 0.1 * torch.randn(200, 1, 4, 4)).clamp(0, 1)
    return OfUnit(Network().requires_grad_(False)), x, label


def test_steps_of_order_four_come_to_the_matrix_exponential() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=generator).double() - 2 * torch.eye(5).double()
    z = torch.randn(3, 5, generator=generator).double()
    exact = z.numpy() @ expm(2.0 * matrix.numpy()).T
    errors = [np.abs(runge_kutta(lambda z: z @ matrix.T, z, 2.0, n).numpy() - exact).max() for n in (20, 40)]
    assert errors[1] < 1e-4 and 12 < errors[0] / errors[1] < 20, "a sixteenth for half the step"
    assert torch.equal(runge_kutta(lambda z: z @ matrix.T, z, 2.0, 0), z)


def test_regularisers_are_those_of_autograds_jacobian() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    z, still, diagonal, dominance = torch.randn(4, 5).double(), 0.0, 0.0, 0.0
    for one in z:
        jacobian = torch.autograd.functional.jacobian(layers, one)
        for i in range(5):
            still += layers(one)[i].item() ** 2 / 20
            diagonal += np.exp(jacobian[i, i].item()) / 20
            others = sum(abs(jacobian[i, j].item()) for j in range(5) if j != i)
            dominance += np.exp(others + jacobian[i, i].item()) / 20
    assert [r.item() for r in regularisers(layers, z)] == pytest.approx([still, diagonal, dominance])


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (4, 3), (10, 32)])
def test_corners_of_a_simplex_are_equally_far_apart(classes: int, dim: int) -> None:
    corners = simplex(classes, dim)
    expected = torch.eye(classes) * classes / (classes - 1) - 1 / (classes - 1)
    torch.testing.assert_close(corners @ corners.T, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"need {classes - 1} dimensions"):
        simplex(classes, classes - 2)


def test_without_steps_the_answer_is_the_networks_but_for_the_mean(clean) -> None:  # type: ignore[no-untyped-def]
    network, x, label = clean
    for dim in (2, 16):  # fewer than a simplex needs, and more than there are features
        ode, logits = StableODE(network, x, label, 0, dim), network(x)
        found = ode.logits(ode.flow(ode.start(network.pooled(x)), 0))
        torch.testing.assert_close(found, logits - logits.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)


def test_clean_images_are_stable_equilibria(clean) -> None:  # type: ignore[no-untyped-def]
    network, x, label = clean
    ode, untrained = (StableODE(network, x, label, steps, 8) for steps in (200, 0))
    z = ode.start(ode.seen)

    def jacobians(of: StableODE) -> torch.Tensor:
        return torch.stack([torch.autograd.functional.jacobian(of.field, one) for one in z[:40]])

    found, diagonal = jacobians(ode), jacobians(ode).diagonal(dim1=1, dim2=2)
    dominant = diagonal.abs() > found.abs().sum(2) - diagonal.abs()
    assert (diagonal < 0).all() and dominant.float().mean() > 0.75
    assert torch.linalg.eigvals(found).real.max() < 0 < torch.linalg.eigvals(jacobians(untrained)).real.max()
    assert ode.field(z).square().mean() < 0.2 * diagonal.square().mean(), "a step to the equilibrium is short"
    moved = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    apart = [(of.flow(moved, 10) - of.flow(z, 10)).norm(dim=1).mean() for of in (ode, untrained)]
    assert apart[0] < 0.5 * (moved - z).norm(dim=1).mean() < apart[1]
    stiff = (ode.flow(z, 10) - ode.flow(z, 80)).norm(dim=1) / z.norm(dim=1)
    assert stiff.max() < 1e-2, "ten steps are enough"


def test_likeness_is_of_the_nearest_image_of_a_class(clean) -> None:  # type: ignore[no-untyped-def]
    network, x, label = clean
    some = label != 2
    found = StableODE(network, x[some], label[some], 0).likeness(network.pooled(x[:5] + 0.1))
    for one, row in zip(network.pooled(x[:5] + 0.1).numpy(), found.numpy(), strict=True):
        seen = network.pooled(x).numpy()
        expected = [-np.abs(seen[label.numpy() == k] - one).sum(1).min() if k != 2 else -np.inf for k in range(4)]
        assert row == pytest.approx(expected, rel=1e-4)
