"""The evaluator of epistemic networks against loops, and its costs against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayproj.classifiers.ensembles import Ensemble
from rayproj.classifiers.epinet import EpistemicConfig, EpistemicKind
from rayproj.classifiers.networks import ClassifierConfig, build
from rayproj.evaluation import epistemic
from rayproj.evaluation.epistemic import Outcome, measures

SHAPE, CLASSES = (1, 16, 16), 4
WIDTHS = (8, 16)


def of(kind: EpistemicKind, **values: int) -> epistemic.EpistemicNetwork:
    torch.manual_seed(0)
    config = ClassifierConfig(channels=WIDTHS, dropout=0.0, epistemic=EpistemicConfig(kind, **values))  # type: ignore[arg-type]
    built = build(config, 1, 32, CLASSES)
    return built if isinstance(built, epistemic.EpistemicNetwork) else Ensemble([built])


def images(count: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_measures_are_what_they_say() -> None:
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(6, 40, CLASSES), torch.arange(40) % CLASSES
    parts = [Outcome.of(logits[:, i : i + 17], labels[i : i + 17], 1.3) for i in range(0, 40, 17)]
    found = measures(Outcome.joined(parts), labels.numpy(), tau=3)
    p = (logits / 1.3).softmax(2).double()
    true = p[:, torch.arange(40), labels]
    assert found["accuracy"] == (p.mean(0).argmax(1) == labels).double().mean()
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert found["marginal_nll"] == pytest.approx(-true.mean(0).log().mean().item(), rel=1e-5)
    joint = [-true[:, i : i + 3].prod(1).mean().log().item() for i in range(0, 39, 3)]
    assert found["joint_nll"] == pytest.approx(np.mean(joint), rel=1e-5)
    assert found["joint_nll_error"] == pytest.approx(np.std(joint) / math.sqrt(13), rel=1e-5)
    exact = []
    for pair in range(0, 40, 2):
        for n in range(4):
            both = true[:, pair] ** n * true[:, pair + 1] ** (3 - n)
            exact.append(-math.comb(3, n) / 8 * both.mean().log().item() * 4)
    assert found["dyadic_nll_exact"] == pytest.approx(np.mean(exact), rel=1e-5)
    assert found["dyadic_nll"] == pytest.approx(found["dyadic_nll_exact"], rel=0.2)
    assert found["dyadic_nll_independent"] == pytest.approx(3 * found["marginal_nll"], rel=1e-5)
    assert found["doubt_epistemic"] == pytest.approx(found["doubt_total"] - found["doubt_aleatoric"])


def test_the_temperature_is_that_of_the_least_loss() -> None:
    torch.manual_seed(1)
    labels = torch.randint(0, CLASSES, (500,))
    calibrated = torch.randn(1, 500, CLASSES) + 1.5 * F.one_hot(labels, CLASSES)
    sharp = 4 * calibrated
    ratio = epistemic.fitted_temperature(sharp, labels) / epistemic.fitted_temperature(calibrated, labels)
    assert ratio == pytest.approx(4, rel=0.03)
    best = epistemic.fitted_temperature(sharp, labels)
    losses = [F.cross_entropy(sharp[0] / t, labels).item() for t in (0.9 * best, best, 1.1 * best)]
    assert losses[1] < min(losses[0], losses[2])


def test_indices_in_pieces_are_those_at_once() -> None:
    model = of(EpistemicKind.epinet)
    z = model.indices(250)
    with torch.no_grad():
        torch.testing.assert_close(epistemic.logits_of(model, images(), z), model(images(), z))


def flops(batch: int) -> int:
    """Of a forward of the small ConvNet: twice the multiplications of its convolutions and its head."""
    total, inputs, side = 0, 1, 16
    for width in WIDTHS:
        side //= 2
        total += side * side * 9 * (inputs * width + width * width)
        inputs = width
    return 2 * batch * (total + inputs * CLASSES)


def test_the_cost_of_an_ensemble_is_that_of_its_members() -> None:
    model = of(EpistemicKind.ensemble, members=3, prior=0)
    for count in (1, 3):
        cost = epistemic.inference_cost(model, images(), count)
        assert cost["inference_flops"] == pytest.approx(count * flops(1), rel=1e-3) and cost["inference_seconds"] > 0
        assert epistemic.parameters(model, count)["parameters"] == count * (
            sum(p.numel() for p in model.members[0].parameters())  # type: ignore[union-attr,operator]
        )
    # A backward does each product twice more, but for the gradient of the images.
    first = 2 * 8 * 8 * 9 * WIDTHS[0]
    assert epistemic.training_flops(model, images()) == pytest.approx(3 * (3 * flops(1) - first), rel=0.01)


def test_the_cost_of_an_epinet_is_its_base_once_and_little_for_each_index() -> None:
    model = of(EpistemicKind.epinet)
    cost = {count: epistemic.inference_cost(model, images(), count)["inference_flops"] for count in (1, 50, 100)}
    each, batch, hidden, index = (cost[100] - cost[50]) / 50, 8, 50, 20
    shared = 2 * index * hidden + 2 * CLASSES * index * hidden + 2 * index * CLASSES  # of an index, for the whole batch
    assert each == pytest.approx(2 * (2 * hidden * CLASSES + shared / batch), rel=1e-6)
    assert cost[1] - each == pytest.approx(flops(1) + 2 * 2 * WIDTHS[-1] * hidden)
    frozen = epistemic.parameters(model, 100)
    model.base.requires_grad_(False)  # type: ignore[operator,union-attr]
    assert epistemic.parameters(model, 100)["trained"] < frozen["trained"] < frozen["parameters"]
    assert epistemic.training_flops(model.train(), images()) < flops(1) + 200 * each
