import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import nn

from rayproj.classifiers.soups import Learned, Stack, Weights, barrier, few_shot, greedy, grid, learned, soup
from rayproj.errors import UserError
from rayproj.robustness.apgd import apgd
from rayproj.robustness.losses import cross_entropy
from rayproj.robustness.oracle import Oracle
from rayproj.robustness.threats import Norm, Threat
from tests.support.linear import digits, small_network, trained


def states(count: int = 3) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    found = [{"w": torch.randn(4, 3, generator=g), "b": torch.randn(4, generator=g)} for _ in range(count)]
    return [{**state, "steps": torch.tensor(i)} for i, state in enumerate(found)]


def test_a_soup_of_one_and_of_copies_is_it_to_the_last_bit() -> None:
    some = states()
    assert all(torch.equal(v, some[1][n]) for n, v in soup(some, [0, 1.0, 0]).items() if n != "steps")
    copies = soup([some[0]] * 4, [0.25] * 4)
    assert all(torch.equal(v, some[0][n]) for n, v in copies.items())
    assert soup(some, [0.2, 0.3, 0.5])["steps"] == 0  # integers are the first's


def test_soups_of_soups_are_soups() -> None:
    a, b, c = states()
    twice = soup([soup([a, b], [0.25, 0.75]), c], [0.4, 0.6])
    once = soup([a, b, c], [0.1, 0.3, 0.6])
    for name in ("w", "b"):
        torch.testing.assert_close(twice[name], once[name], rtol=0, atol=1e-6)


def test_of_linear_networks_the_soup_is_the_ensemble() -> None:
    layers, x, weights = [nn.Linear(3, 4) for _ in range(3)], torch.randn(5, 3), [0.7, -0.2, 0.5]
    mixed = nn.Linear(3, 4)
    mixed.load_state_dict(soup([layer.state_dict() for layer in layers], weights))
    expected = sum(w * layer(x) for w, layer in zip(weights, layers, strict=True))
    torch.testing.assert_close(mixed(x), expected)


def test_networks_of_different_kinds() -> None:
    with pytest.raises(UserError, match="'b' is not the same in all"):
        soup([states()[0], {**states()[1], "b": torch.zeros(5)}], [0.5, 0.5])


@pytest.mark.parametrize(("members", "parts"), [(2, 10), (3, 5), (4, 5)])
def test_a_grid_has_every_point_of_the_simplex_once(members: int, parts: int) -> None:
    found = grid(members, parts)
    assert len(found) == math.comb(parts + members - 1, members - 1) == len({tuple(row) for row in found})
    np.testing.assert_allclose(found.sum(1), 1)
    assert found.min() == 0 and found.max() == 1
    wider = grid(members, parts, beyond=0.4)
    np.testing.assert_allclose(wider.sum(1), 1)
    assert wider.min() == pytest.approx(-0.4) and wider.max() == pytest.approx(1.4) and len(wider) > len(found)


@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_candidates_together_are_those_one_by_one_attacked_too(at_once: int) -> None:
    x, label = digits()
    first = small_network(x[:600], label[:600])
    torch.manual_seed(1)
    second = {n: p + 0.05 * torch.randn_like(p) for n, p in first.state_dict().items()}
    members, weights = [first.state_dict(), second], grid(2, 4, 0.5)
    stack = Stack(first, members, weights, at_once)
    x, label = x[600:640], label[600:640]
    logits = stack(x)
    assert logits.shape == (len(weights), 40, 10)
    threat, row = (
        Threat(Norm.linf, 0.05),
        torch.stack([torch.arange(40), torch.zeros(40).long(), torch.zeros(40).long()], 1),
    )
    many = [t.repeat(len(weights), *[1] * (t.dim() - 1)) for t in (x, label, row)]
    attacked = apgd(Oracle(stack.flat), *many, threat, cross_entropy, 10, go_on=True)
    parts = torch.cat([part(x) for part in stack.parts()])
    torch.testing.assert_close(parts, logits, rtol=1e-4, atol=1e-4)
    for k, weight in enumerate(weights):
        one = small_network(x[:2], label[:2])
        one.load_state_dict(soup(members, weight.tolist()))
        torch.testing.assert_close(logits[k], one(x), rtol=1e-4, atol=1e-4)
        alone = apgd(Oracle(one), x, label, row, threat, cross_entropy, 10, go_on=True)
        assert (alone.broken != attacked.broken.view(len(weights), 40)[k]).sum() <= 1  # but for rounding


def test_networks_that_began_apart_have_a_barrier_between_them_and_such_of_one_start_none() -> None:
    """Frankle et al. 2020: what makes weights mix is a start that they share."""
    x, label = digits()
    x, label, test, truth = x[:600], label[:600], x[600:900], label[600:900]
    first = small_network(x, label)
    ends = {}
    for name, seed in (("apart", 7), ("shared", None)):
        torch.manual_seed(seed or 0)
        other = copy.deepcopy(first).requires_grad_(True)
        if seed is not None:
            for layer in other:
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
        ends[name] = trained(other, x + 0.1 * torch.randn_like(x), label, 120).state_dict()
    found = {}
    for name, end in ends.items():
        stack = Stack(first, [first.state_dict(), end], np.array([[1 - w, w] for w in np.linspace(0, 1, 11)]))
        with torch.no_grad():
            error = (stack(test).argmax(2) != truth).float().mean(1)
        assert max(error[0], error[-1]) < 0.2, "both ends are good"
        found[name] = barrier(error.tolist())
    assert found["apart"] > 0.1 and found["shared"] < 0.03


def test_the_greedy_soup_takes_what_does_not_hurt() -> None:
    good = {0, 2}

    def score(weights: object) -> float:
        kept = [i for i, w in enumerate(weights) if w > 0]  # type: ignore[arg-type, var-annotated]
        return 0.5 + 0.1 * len(good & set(kept)) - 0.2 * len(set(kept) - good)

    assert greedy([0.6, 0.3, 0.55], score) == [0.5, 0.0, 0.5]


def test_a_barrier_is_what_rises_above_the_line() -> None:
    assert barrier([1.0, 2.5, 2.0, 3.0]) == pytest.approx(2.5 - (1 + 2 / 3))
    assert barrier([1.0, 2.0, 3.0]) == pytest.approx(0)


def test_a_choice_by_few_images_never_sees_those_it_is_judged_by() -> None:
    rng = np.random.default_rng(0)
    correct = np.stack([rng.random(400) < p for p in (0.5, 0.6, 0.8)])
    chosen, reached = few_shot(correct, 100, 50, rng)
    assert (chosen == 2).mean() > 0.9 and reached[chosen == 2].mean() == pytest.approx(0.8, abs=0.03)
    # On pure noise, where the choice has nothing to go by, the rest is at chance: no image counts for both.
    noise = rng.random((200, 60)) < 0.5
    assert few_shot(noise, 10, 300, rng)[1].mean() == pytest.approx(0.5, abs=0.03)


class Linear(nn.Module):
    """Logits that are linear in the weights of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(3, 4, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x.square())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", list(Learned), ids=lambda how: how.value)
def test_learned_weights_are_the_optimum_where_the_problem_is_convex(how: Learned) -> None:
    """Of logits that are linear in the weights, against scipy on the members' logits, which knows no soup; the last of its
    variables is the logarithm of a factor of all logits."""
    torch.manual_seed(3)
    members = [Linear() for _ in range(3)]
    x, truth = torch.randn(200, 3).double(), Linear()
    with torch.no_grad():
        label = torch.distributions.Categorical(logits=2 * truth(x)).sample()
        parts = np.array([[m.first(x).numpy() for m in members], [m.second(x.square()).numpy() for m in members]])
    by_layer, convex = "layer" in how.value, "convex" in how.value

    def loss(w: np.ndarray) -> float:
        rows = np.broadcast_to(w[:-1].reshape(-1, 3), (2, 3))
        logits = np.exp(w[-1]) * np.einsum("li,libk->bk", rows, parts)
        return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(200), label]))

    rows = 2 if by_layer else 1
    sums = {"type": "eq", "fun": lambda w: w[:-1].reshape(-1, 3).sum(1) - 1}
    bounds = [(0, 1)] * (3 * rows) + [(None, None)] if convex else None
    start = np.append(np.full(3 * rows, 1 / 3), 0.0)
    best = minimize(
        loss, start, method="SLSQP", bounds=bounds, constraints=[sums], options={"ftol": 1e-12, "maxiter": 300}
    )
    states = [m.state_dict() for m in members]
    found = learned(members[0].requires_grad_(False), states, x, label, how, 200)
    assert isinstance(found, dict) == by_layer
    rows_found = np.array([found["first"], found["second"]] if isinstance(found, dict) else [found])
    np.testing.assert_allclose(rows_found.sum(1), 1, atol=1e-6)
    ours = np.append(rows_found.ravel(), best.x[-1])
    assert loss(ours) < loss(start) - 1e-3, "it is not where it began"
    assert loss(ours) == pytest.approx(best.fun, abs=1e-5) and abs(best.x[-1]) > 0.01
    np.testing.assert_allclose(rows_found, best.x[:-1].reshape(rows, 3), atol=0.01)
    mixed = Linear()
    mixed.load_state_dict(soup(states, found))
    value = nn.functional.cross_entropy(np.exp(best.x[-1]) * mixed(x), label).item()
    assert value == pytest.approx(loss(ours), abs=1e-9)


def test_with_more_freedom_there_is_less_loss_on_the_images_that_teach() -> None:
    x, label = digits()
    first = small_network(x[:300], label[:300])
    states = [first.state_dict()]
    for seed in (1, 2):
        other = copy.deepcopy(first).requires_grad_(True)
        torch.manual_seed(seed)
        states.append(trained(other, x[:300] + 0.2 * torch.randn_like(x[:300]), label[:300], 20).state_dict())
    some, few = x[600:660] + 0.3 * torch.randn(60, 1, 8, 8), label[600:660]

    def loss(weights: Weights) -> float:
        logits = torch.func.functional_call(first, soup(states, weights), (some,))
        return float(nn.functional.cross_entropy(logits, few))

    even, convex, affine, by_layer = (
        loss([1 / 3] * 3),
        *(loss(learned(first, states, some, few, how, 30)) for how in (Learned.convex, Learned.affine)),
        loss(learned(first, states, some, few, Learned.affine_by_layer, 30)),
    )
    assert by_layer < affine <= convex + 1e-4 <= even + 2e-4 and affine < even
