import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from rayproj.robustness.fab import fab, onto_plane
from rayproj.robustness.oracle import Oracle
from rayproj.robustness.threats import Norm, Threat, size
from tests.support.linear import digits, linear_network, most_gain, small_network


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("seed", range(6))
def test_the_move_onto_a_plane_is_the_smallest(norm: Norm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.random(7), rng.normal(size=7)
    value = rng.uniform(-0.8, 0.8) * np.abs(w).sum() / 2
    if abs(value) > np.abs(w) @ np.where(-w * np.sign(value) > 0, 1 - x, x):
        value = 0.9 * np.sign(value) * np.abs(w) @ np.where(-w * np.sign(value) > 0, 1 - x, x)
    found = onto_plane(*(torch.tensor(v)[None] for v in (x, w)), torch.tensor([value]), norm)[0].numpy()
    np.testing.assert_allclose(w @ found + value, 0, atol=1e-9)
    assert (x + found >= -1e-9).all() and (x + found <= 1 + 1e-9).all()
    mine = size(torch.tensor(found)[None], norm).item()
    if norm is Norm.l2:
        best = minimize(
            lambda d: d @ d, np.zeros(7), bounds=list(zip(-x, 1 - x, strict=True)), method="SLSQP",
            constraints={"type": "eq", "fun": lambda d: w @ d + value}, options={"ftol": 1e-15, "maxiter": 500},
        )  # fmt: skip
        expected = np.sqrt(best.fun)
    elif norm is Norm.l1:
        limits = [(0, v) for v in 1 - x] + [(0, v) for v in x]
        expected = linprog(np.ones(14), A_eq=[[*w, *-w]], b_eq=[-value], bounds=limits).fun
    else:
        rows = np.block([[np.eye(7), -np.ones((7, 1))], [-np.eye(7), -np.ones((7, 1))]])
        limits = [*zip(-x, 1 - x, strict=True), (0, None)]
        expected = linprog(
            [0] * 7 + [1], A_ub=rows, b_ub=np.zeros(14), A_eq=[[*w, 0]], b_eq=[-value], bounds=limits
        ).fun
    assert mine == pytest.approx(expected, rel=1e-4)


def test_a_plane_beyond_the_box_is_gone_towards_as_far_as_it_goes() -> None:
    x, w = torch.tensor([[0.2, 0.9]]), torch.tensor([[1.0, -1.0]])
    for norm in Norm:
        found = onto_plane(x, w, torch.tensor([-100.0]), norm)
        torch.testing.assert_close(x + found, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("norm", list(Norm))
def test_the_nearest_point_of_a_linear_classifier(norm: Norm) -> None:
    x, label = digits()
    model = linear_network(x, label)
    x, label = x[1000:1060], label[1000:1060]
    right = model(x).argmax(1) == label
    x, label = x[right], label[right]
    target = model(x).scatter(1, label[:, None], -torch.inf).argmax(1)
    found = fab(Oracle(model), x, label, target, Threat(norm, 100.0), go_on=True)
    assert found.broken.all()
    weight, bias = (p.double().numpy() for p in model[1].parameters())
    near = size(found.images - x, norm).numpy()
    for i, (one, y, t) in enumerate(zip(x.flatten(1).double().numpy(), label, target, strict=True)):
        w, value = weight[t] - weight[y], (weight[t] - weight[y]) @ one + bias[t] - bias[y]
        # At 0.98 of what was found this target is out of reach, unless another class was crossed on the way.
        reached = value + most_gain(w, one, Threat(norm, 0.98 * float(near[i])))
        others = [
            (weight[k] - weight[y]) @ one + bias[k] - bias[y]
            + most_gain(weight[k] - weight[y], one, Threat(norm, 0.98 * float(near[i])))
            for k in range(10) if k not in (int(y), int(t))
        ]  # fmt: skip
        assert reached < 0.02 or max(others) > 0


def test_only_what_lies_in_the_ball_is_broken() -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label, threat = x[600:700], label[600:700], Threat(Norm.l2, 0.5)
    target = model(x).scatter(1, label[:, None], -torch.inf).argmax(1)
    found = fab(Oracle(model), x, label, target, threat, steps=30)
    assert 5 < found.broken.sum() < 95
    assert threat.holds(x[found.broken], found.images[found.broken]).all()
    assert (model(found.images[found.broken]).argmax(1) != label[found.broken]).all()
