"""RayS against the algorithm as it is printed, one example after the other, and against closed forms."""

import math

import pytest
import torch

from rayproj.robustness.oracle import Oracle
from rayproj.robustness.rays import CLOSE, rays
from rayproj.robustness.threats import Norm, Threat, size
from tests.support.linear import digits, small_network


def printed(model, x: torch.Tensor, label: int, eps: float, queries: int) -> int | None:
    """Queries until a point within `eps` is found, of one image in ℓ∞."""
    n, used = x.numel(), 0
    best, direction = math.inf, torch.ones(n)
    level, block = 0, None

    def fools(trial: torch.Tensor, radius: float) -> bool:
        nonlocal used
        used += 1
        point = (x.flatten() + radius * trial).clamp(0, 1).view_as(x)
        return int(model(point[None]).argmax()) != label

    while used < queries:
        trial = direction.clone()
        width = math.ceil(n / 2**level)
        if block is not None:
            trial[block * width : (block + 1) * width] *= -1
        radius = min(best, 1.0)
        if fools(trial, radius):
            low, high = 0.0, radius
            if high <= eps:
                return used
            while high - low > CLOSE * eps and used < queries:
                middle = (low + high) / 2
                if fools(trial, middle):
                    high = middle
                    if high <= eps:
                        return used
                else:
                    low = middle
            best, direction = high, trial
        block = 0 if block is None else block + 1
        if block * width >= n:
            level, block = level + 1, 0
    return None


def test_it_asks_what_the_printed_algorithm_asks() -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label, threat = x[600:630], label[600:630], Threat(Norm.linf, 0.1)
    oracle = Oracle(model)
    found = rays(oracle, x, label, threat, 80)
    with torch.no_grad():
        alone = [printed(model, one, int(of), threat.eps, 80) for one, of in zip(x, label, strict=True)]
    assert oracle.backwards == 0 and 5 < found.broken.sum() < 30
    assert [used is not None for used in alone] == found.broken.tolist()
    assert oracle.forwards == sum(80 if used is None else used for used in alone)


@pytest.mark.parametrize("threat", [Threat(Norm.linf, 0.2), Threat(Norm.l2, 1.5), Threat(Norm.l1, 12.0)], ids=str)
def test_it_breaks_within_the_ball(threat: Threat) -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label = x[600:660], label[600:660]
    few, many = (rays(Oracle(model), x, label, threat, n) for n in (5, 400))
    assert threat.holds(x, many.images).all()
    assert torch.equal(model(many.images).argmax(1) != label, many.broken)
    assert (many.broken | ~few.broken).all() and many.broken.sum() > few.broken.sum()


def test_on_a_linear_classifier_it_comes_to_the_nearest_border() -> None:
    """Which is at the margin over the ℓ1 norm of the weights, all signs being those of the weights."""
    torch.manual_seed(0)
    w, x = torch.randn(16), torch.full((40, 1, 4, 4), 0.5) + 0.02 * torch.randn(40, 1, 4, 4)
    score = x.flatten(1) @ w
    bias = 0.1 * torch.randn(()) - score.mean()

    def model(images: torch.Tensor) -> torch.Tensor:
        value = images.flatten(1) @ w + bias
        return torch.stack([value, -value], 1)

    label = model(x).argmax(1)
    exact = (score + bias).abs() / w.abs().sum()
    for scale, broken in ((1.05, True), (0.999, False)):
        for eps in exact.quantile(torch.tensor([0.2, 0.5, 0.9])).tolist():
            threat = Threat(Norm.linf, eps)
            within = exact * scale <= eps
            found = rays(Oracle(model), x, label, threat, 2000).broken
            assert found[within].all() if broken else not found[exact * scale > eps].any()


def test_a_point_that_holds_is_at_the_edge() -> None:
    x = torch.rand(3, 1, 4, 4) * 0.5 + 0.25
    threat = Threat(Norm.l2, 0.2)
    found = rays(Oracle(lambda images: torch.eye(2)[[0]].repeat(len(images), 1)), x, torch.zeros(3).long(), threat, 20)
    assert not found.broken.any() and size(found.images - x, Norm.l2).allclose(torch.tensor(0.2))
