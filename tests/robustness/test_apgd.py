import numpy as np
import pytest
import torch

from rayproj.robustness.apgd import apgd, apgd_from_afar, checkpoints
from rayproj.robustness.losses import cross_entropy, dlr, target_dlr
from rayproj.robustness.oracle import Oracle
from rayproj.robustness.threats import Norm, Threat
from tests.support.linear import digits, exactly_robust, linear_network, small_network

THREATS = [Threat(Norm.linf, 0.05), Threat(Norm.linf, 0.1), Threat(Norm.l2, 0.5), Threat(Norm.l1, 2.0)]


def rows(count: int) -> torch.Tensor:
    return torch.stack([torch.arange(count), torch.zeros(count).long(), torch.zeros(count).long()], 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (40, [8, 15, 21, 26, 30, 33, 35, 37, 39]),
        (20, [4, 7, *range(9, 21)]),
        (10, list(range(2, 11))),
    ],
)
def test_checkpoints(steps: int, expected: list[int]) -> None:
    assert checkpoints(steps) == expected


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_linear_classifier_is_broken_exactly_where_it_can_be(threat: Threat) -> None:
    x, label = digits()
    model = linear_network(x, label)
    x, label = x[1000:1400], label[1000:1400]
    right = model(x).argmax(1) == label
    x, label = x[right], label[right]
    weight, bias = (p.double().numpy() for p in model[1].parameters())
    expected = exactly_robust(weight, bias, x.flatten(1).double().numpy(), label.numpy(), threat)
    assert 0.1 < expected.mean() < 0.95
    ascend = apgd_from_afar if threat.norm is Norm.l1 else apgd
    # Of two rivals the ascent may follow the wrong one: each is tried, as AutoAttack does.
    logits, robust = model(x), np.ones(len(x), bool)
    for rank in range(9):
        other = logits.scatter(1, label[:, None], -torch.inf).argsort(1, descending=True)[:, rank]
        found = ascend(Oracle(model), x, label, rows(len(x)), threat, target_dlr, target=other)
        assert threat.holds(x, found.images).all()
        assert torch.equal(model(found.images).argmax(1) != label, found.broken)
        robust &= ~found.broken.numpy()
    assert not (expected & ~robust).any()
    # The sparse steps for ℓ1 stop short of the last few; FAB finds those (test_autoattack).
    assert (robust & ~expected).sum() <= (0.02 * len(x) if threat.norm is Norm.l1 else 0)


@pytest.mark.parametrize("threat", THREATS[1:], ids=str)
def test_what_comes_of_an_image_depends_on_no_other(threat: Threat) -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600]).double()
    x, label = x[600:640].double(), label[600:640]
    together = apgd(Oracle(model), x, label, rows(40), threat, dlr, steps=20)
    assert 0 < together.broken.sum() < 40
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for part in order.split(7):
        alone = apgd(Oracle(model), x[part], label[part], rows(40)[part], threat, dlr, steps=20)
        assert torch.equal(alone.broken, together.broken[part])
        torch.testing.assert_close(alone.images, together.images[part], rtol=0, atol=1e-5)


def test_the_highest_loss_is_kept_and_more_steps_find_more() -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label = x[600:800], label[600:800]
    losses, threat = [], Threat(Norm.linf, 0.08)
    for steps in (2, 10, 40):
        oracle = Oracle(model)
        found = apgd(oracle, x, label, rows(200), threat, cross_entropy, steps, go_on=True)
        losses.append(cross_entropy(model(found.images), label, label).mean().item())
        assert oracle.forwards == oracle.backwards == 200 * (steps + 1)
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("threat", [Threat(Norm.linf, 0.5), Threat(Norm.l2, 5.0), Threat(Norm.l1, 40.0)], ids=str)
def test_it_stops_asking_about_what_is_broken(threat: Threat) -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    oracle = Oracle(model)
    found = apgd(oracle, x[600:700], label[600:700], rows(100), threat, steps=50)
    assert found.broken.sum() >= 95 and oracle.forwards < 100 * 10


def test_scaled_logits_do_not_hide_a_model_from_dlr() -> None:
    x, label = digits()
    model = small_network(x[:600], label[:600])
    x, label, threat = x[600:700], label[600:700], Threat(Norm.linf, 0.08)
    plain, scaled = (
        apgd(Oracle(lambda z, s=s: model(z) * s), x, label, rows(100), threat, dlr, 30).broken for s in (1, 1e4)
    )
    assert abs(plain.sum() - scaled.sum()) <= 2 and plain.sum() > 20
