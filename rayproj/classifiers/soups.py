"""Linear combinations of the weights of networks that were trained from one start (Wortsman et al. 2022, "Model soups";
Croce et al. 2023, "Seasoning model soups for robustness to adversarial and natural distribution shifts")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj.classifiers.networks import VisionTransformer
from rayproj.errors import UserError

State = Mapping[str, Tensor]
Weights = Sequence[float] | Mapping[str, Sequence[float]]
"""One for each member, or that in each layer, by `layer`."""

AT_ONCE = 32  # candidates on a GPU, whose weights and activations are there at a time
KEPT = 2**30  # bytes of soups that wait to be asked again, of which there is always one


def soup(states: Sequence[State], weights: Weights) -> dict[str, Tensor]:
    """Σ_i w_i θ_i, summed in double precision; what is not floating point is taken from the first.

    Weights may be negative, and those of the papers sum to 1.

    Raises:
        UserError: the states are not of one kind of network; it names the difference.
    """
    first = states[0]
    for other in states[1:]:
        wrong = sorted(set(first) ^ set(other)) or [n for n in first if first[n].shape != other[n].shape]
        if wrong:
            raise UserError(f"Networks of different kinds cannot be mixed: '{wrong[0]}' is not the same in all.")
    found = {}
    for name, tensor in first.items():
        own = weights[layer(name)] if isinstance(weights, Mapping) else weights
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
        elif 1.0 in own and sum(map(bool, own)) == 1:  # one alone, to the last bit
            found[name] = states[list(own).index(1.0)][name].clone()
        else:
            mixed = sum(w * state[name].double() for state, w in zip(states, own, strict=True))
            found[name] = mixed.to(tensor.dtype)  # type: ignore[union-attr]
    return found


def layer(name: str) -> str:
    """The layer of a parameter, whose weight and bias belong together."""
    return name.rpartition(".")[0]


def grid(members: int, parts: int, beyond: float = 0.0) -> np.ndarray:
    """Weights [n, members] that sum to 1, in steps of 1 / parts, each at least -beyond and at most 1 + beyond.

    Without `beyond` these are the C(parts + members - 1, members - 1) points of a simplex.
    """
    low, high = -math.floor(beyond * parts + 1e-9), parts + math.floor(beyond * parts + 1e-9)
    points = [
        (*some, parts - sum(some))
        for some in product(range(low, high + 1), repeat=members - 1)
        if low <= parts - sum(some) <= high
    ]
    return np.array(sorted(points, reverse=True), float) / parts


class Stack:
    """Many soups of one network, evaluated together on the same images: on a GPU some at a time in one pass by `torch.func`,
    on a CPU, where one network keeps all cores busy and small matrices in batches are slow, one after the other. Soups are
    made when their turn comes, and only as many are kept as a gibibyte holds.

    Args:
        network: gives the form; it is changed.
        states: of the members.
        weights: of each candidate.
        at_once: how many in one pass; None: as is faster where the states are.
    """

    def __init__(
        self,
        network: nn.Module,
        states: Sequence[State],
        weights: Sequence[Weights] | np.ndarray,
        at_once: int | None = None,
    ) -> None:
        self.network, self.states, self.weights, self.count = network, states, weights, len(weights)
        on_gpu = any(tensor.device.type != "cpu" for tensor in states[0].values())
        self.at_once = (AT_ONCE if on_gpu else 1) if at_once is None else at_once
        size = self.at_once * sum(tensor.nbytes for tensor in states[0].values())
        self._stacked = lru_cache(max(1, KEPT // size))(self._made)
        if self.at_once > 1 and isinstance(network, VisionTransformer):
            network.net.set_attn_implementation("eager")  # vmap would go through the other one image by image

    def parts(self) -> Iterator[Stack]:
        """The same soups in stacks of as many as go in one pass."""
        for begin in range(0, self.count, self.at_once):
            yield Stack(self.network, self.states, self.weights[begin : begin + self.at_once], self.at_once)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [candidates, B, K] of images [B, ...] that all see, or [candidates, B, ...], to each its own."""
        own = images.dim() == 5
        if self.at_once == 1:
            return torch.stack([self.alone(k, images[k] if own else images) for k in range(self.count)])
        call = torch.func.vmap(self._one, in_dims=(0, 0 if own else None), randomness="error")
        found = []
        for begin in range(0, self.count, self.at_once):
            end = min(begin + self.at_once, self.count)
            found.append(call(self._stacked(begin, end), images[begin:end] if own else images))
        return torch.cat(found)

    def alone(self, number: int, images: Tensor) -> Tensor:
        """Logits [B, K] of one candidate for images [B, ...]."""
        return self._one({name: tensor[0] for name, tensor in self._stacked(number, number + 1).items()}, images)

    def _made(self, begin: int, end: int) -> dict[str, Tensor]:
        """The weights of some candidates, [end - begin, ...] each."""
        rows = self.weights[begin:end]
        soups = [soup(self.states, row if isinstance(row, Mapping) else list(map(float, row))) for row in rows]
        return {name: torch.stack([one[name] for one in soups]) for name in soups[0]}

    def _one(self, state: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(self.network, state, (images,))  # type: ignore[no-any-return]

    def flat(self, images: Tensor) -> Tensor:
        """The same for [candidates · B, ...], as attacks have them: logits [candidates · B, K]."""
        return self(images.unflatten(0, (self.count, -1))).flatten(0, 1)


class Learned(Enum):
    """How weights are learned from labelled images."""

    convex = "convex"  # of a softmax (Wortsman et al. 2022, recipe 3)
    affine = "affine"  # any that sum to 1
    convex_by_layer = "convex_by_layer"  # and of their own in every layer (ibid., appendix I)
    affine_by_layer = "affine_by_layer"


def learned(
    network: nn.Module, states: Sequence[State], images: Tensor, label: Tensor, how: Learned, steps: int
) -> Weights:
    """Weights of least cross-entropy of β f(x) on labelled images [B, ...], from the even mixture and β = 1 on by L-BFGS.
    What β is, is forgotten: it keeps weights from being chosen for how sure they are.

    With many weights and few images the number of steps is what keeps them near the even mixture.

    Args:
        steps: of L-BFGS, at most.
    """
    first = states[0]
    stacked = {
        name: torch.stack([state[name] for state in states]) for name in first if first[name].is_floating_point()
    }
    by_layer = how in (Learned.convex_by_layer, Learned.affine_by_layer)
    places = {name: layer(name) if by_layer else "" for name in stacked}
    names = sorted(set(places.values()))
    free = torch.zeros(len(names), len(states), dtype=torch.float64, device=label.device, requires_grad=True)
    log_beta = torch.zeros((), dtype=torch.float64, device=label.device, requires_grad=True)

    def weights() -> Tensor:
        if how in (Learned.convex, Learned.convex_by_layer):
            return free.softmax(1)
        return free - free.mean(1, keepdim=True) + 1 / len(states)

    def closure() -> Tensor:
        rows = dict(zip(names, weights(), strict=True))
        mixed = {name: torch.tensordot(rows[places[name]].to(all_), all_, 1) for name, all_ in stacked.items()}
        logits = torch.func.functional_call(network, {**first, **mixed}, (images,))
        loss = F.cross_entropy(log_beta.exp().to(logits) * logits, label)
        free.grad, log_beta.grad = torch.autograd.grad(loss, (free, log_beta))
        return loss

    torch.optim.LBFGS([free, log_beta], max_iter=steps, line_search_fn="strong_wolfe").step(closure)
    found = dict(zip(names, weights().tolist(), strict=True))
    return found if by_layer else found[""]


Score = Callable[[Sequence[float]], float]
"""How good a soup of these weights is."""


def greedy(alone: Sequence[float], score: Score) -> list[float]:
    """Weights of the greedy soup (Wortsman et al. 2022, recipe 1): the members from the best alone on, each kept where the
    even mixture is not worse for it.

    Args:
        alone: the score of each member.
    """
    order = np.argsort(-np.asarray(alone), kind="stable").tolist()
    kept, best = [order[0]], alone[order[0]]
    for member in order[1:]:
        reached = score(_even([*kept, member], len(alone)))
        if reached >= best:
            kept, best = [*kept, member], reached
    return _even(kept, len(alone))


def _even(kept: Sequence[int], members: int) -> list[float]:
    return [kept.count(i) / len(kept) for i in range(members)]


def barrier(values: Sequence[float]) -> float:
    """How far the loss along a line of soups rises above the straight line between its ends (Frankle et al. 2020)."""
    ends = np.linspace(values[0], values[-1], len(values))
    return float((np.asarray(values) - ends).max())


def few_shot(correct: np.ndarray, shots: int, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What choosing a soup by a few labelled images comes to.

    Args:
        correct: bool [candidates, images] of a shifted set.
        shots: images that the choice sees.
        draws: how often others are drawn.

    Returns:
        Of each draw the candidate chosen, and its accuracy on the images that the choice did not see.
    """
    chosen, reached = [], []
    for _ in range(draws):
        seen = rng.choice(correct.shape[1], shots, replace=False)
        rest = np.setdiff1d(np.arange(correct.shape[1]), seen)
        best = int(correct[:, seen].mean(1).argmax())
        chosen.append(best)
        reached.append(float(correct[best, rest].mean()))
    return np.array(chosen), np.array(reached)
