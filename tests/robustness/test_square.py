import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack

from rayproj.robustness.oracle import Oracle
from rayproj.robustness.square import bump, pair_of_bumps, share_at, square
from rayproj.robustness.threats import Norm, Threat, size
from tests.support.linear import digits, small_network

THREATS = [Threat(Norm.linf, 0.12), Threat(Norm.l2, 0.9), Threat(Norm.l1, 4.0)]


def rows(count: int) -> torch.Tensor:
    return torch.stack([torch.arange(count), torch.zeros(count).long(), torch.zeros(count).long()], 1)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_it_breaks_by_scores_alone_within_the_ball_and_alike_in_any_company(threat: Threat) -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label = x[600:660], label[600:660]
    oracle = Oracle(model)
    found = square(oracle, x, label, rows(60), threat, queries=300)
    assert oracle.backwards == 0
    assert threat.holds(x, found.images).all()
    assert torch.equal(model(found.images).argmax(1) != label, found.broken)
    assert (model(x).argmax(1) != label).sum() + 8 < found.broken.sum() < 60
    alone = square(Oracle(model), x[20:], label[20:], rows(60)[20:], threat, queries=300)
    assert (alone.broken == found.broken[20:]).float().mean() > 0.97  # but for rounding


def test_more_queries_find_more_and_the_edge_of_the_ball_is_used() -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label = x[600:660], label[600:660]
    for threat in THREATS:
        few, many = (square(Oracle(model), x, label, rows(60), threat, n).broken for n in (10, 300))
        assert few.sum() < many.sum() and (many | ~few).all()
    left = square(Oracle(model), x, label, rows(60), THREATS[1], 30).images
    assert torch.quantile(size(left - x, Norm.l2), 0.5) > 0.5 * THREATS[1].eps


def test_squares_shrink_as_published() -> None:
    at = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert [share_at(q) for q in at] == [0.8 / 2**k for k in range(10)] and share_at(10) == 0.8


@pytest.mark.parametrize(("norm", "power"), [(Norm.l2, 2), (Norm.l1, 4)])
def test_a_change_is_a_bump_up_and_one_down_of_norm_one(norm: Norm, power: int) -> None:
    shape = pair_of_bumps(5, power, norm)
    assert size(shape[None], norm).item() == pytest.approx(1)
    assert (shape[:2] > 0).all() and (shape[2:] < 0).all()
    peak = np.unravel_index(bump(5, 5, power).argmax(), (5, 5))
    assert peak == (2, 2) and bump(5, 5, power)[2, 2] == pytest.approx(1 + 1 / 2**power + 1 / 3**power, abs=1e-6)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm.value)
def test_it_finds_as_many_as_the_published_one(threat: Threat) -> None:
    """Both by as many queries; they draw other squares."""
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label = x[600:700], label[600:700]
    names = {Norm.linf: "Linf", Norm.l2: "L2", Norm.l1: "L1"}
    theirs = AutoAttack(model, norm=names[threat.norm], eps=threat.eps, version="custom", attacks=["square"], seed=0)
    theirs.square.n_queries = 300
    with torch.no_grad():
        found = model(theirs.run_standard_evaluation(x, label, batch_size=100)[0]).argmax(1) != label
    ours = square(Oracle(model), x, label, rows(100), threat, queries=300).broken
    assert 10 < found.sum() < 95, "neither none nor all"
    assert ours.sum() >= found.sum() - 8, "two standard deviations of what luck makes of either"
