import pytest
import torch
from torch import nn

from rayproj.robustness.masking import signs
from rayproj.robustness.threats import Norm, Threat
from tests.support.linear import digits, small_network

THREAT = Threat(Norm.linf, 0.1)


@pytest.fixture(scope="module")
def data():  # type: ignore[no-untyped-def]
    x, label = digits()
    return small_network(x[:600], label[:600]), x[600:680], label[600:680]


def seen(model, x, label):  # type: ignore[no-untyped-def]
    found = {sign.name: sign for sign in signs(model, x, label, torch.arange(len(x)), THREAT, queries=300)}
    return {name for name, sign in found.items() if sign.seen}, found


def test_an_honest_model_shows_none(data) -> None:  # type: ignore[no-untyped-def]
    names, found = seen(*data)
    assert names == set() and len(found) == 7


def test_a_quantiser_in_front_is_seen(data) -> None:  # type: ignore[no-untyped-def]
    model, x, label = data
    names, found = seen(lambda z: model((z * 8).round() / 8 + 0 * z), x, label)
    assert {"zero_gradients", "loss_does_not_rise", "black_box_is_better", "unbounded_attack_fails"} <= names
    assert found["zero_gradients"].evidence.startswith("100%")


def test_dropout_that_was_left_on(data) -> None:  # type: ignore[no-untyped-def]
    model, x, label = data
    assert "randomised" in seen(lambda z: nn.functional.dropout(model(z), 0.2), x, label)[0]


def test_probabilities_for_logits(data) -> None:  # type: ignore[no-untyped-def]
    model, x, label = data
    assert "probabilities" in seen(lambda z: model(z).softmax(1), x, label)[0]


def test_a_defence_that_optimises_inside(data) -> None:  # type: ignore[no-untyped-def]
    model, x, label = data

    def defended(z: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            logits = model(point)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(1)), point)
        return model(z - 0.05 * gradient.sign())

    assert "inner_optimisation" in seen(defended, x, label)[0]
