"""Signs that a model only looks robust, because its gradients do not lead an attack (Carlini et al. 2019, "On evaluating
adversarial robustness"; Croce and Hein 2020, its "flags")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rayproj.robustness.apgd import apgd, strongest
from rayproj.robustness.losses import cross_entropy, margin
from rayproj.robustness.oracle import Model, Oracle
from rayproj.robustness.square import square
from rayproj.robustness.threats import Norm, Threat

WHOLE = {Norm.linf: 1.0, Norm.l2: 1e3, Norm.l1: 1e6}  # radii within which every image lies


@dataclass(frozen=True)
class Sign:
    """One check.

    Attributes:
        name: what would be amiss.
        seen: whether it is.
        evidence: a sentence with the numbers.
    """

    name: str
    seen: bool
    evidence: str


def signs(
    model: Model,
    x: Tensor,
    label: Tensor,
    ids: Tensor,
    threat: Threat,
    steps: int = 20,
    queries: int = 500,
    seed: int = 0,
) -> list[Sign]:
    """Every check, on some images that need not be many; arguments as of `autoattack`."""
    oracle = Oracle(model)
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 99)], 1)
    with _inner_gradients() as inner:
        first = oracle.logits(x)
    again = [oracle.logits(x) for _ in range(4)]
    difference = max((first - other).abs().max().item() for other in again)
    scale = first.abs().max().clamp(min=1e-12).item()
    found = [
        Sign(
            "randomised",
            difference > 1e-4 * scale,
            f"The same images gave logits that differ by {difference:.2g} of {scale:.2g}; attack.draws averages over them.",
        ),
        Sign(
            "probabilities",
            bool(((first >= 0) & (first <= 1)).all() and ((first.sum(1) - 1).abs() < 1e-4).all()),
            "Outputs between 0 and 1 that sum to 1 look like probabilities; attacks need logits.",
        ),
        Sign(
            "inner_optimisation",
            inner.calls > 0,
            f"A forward pass took {inner.calls} gradients of its own; attack through the defence, or around it with BPDA.",
        ),
    ]
    _, gradient, _ = oracle.ask(x, label, label, cross_entropy)
    zero = (gradient.flatten(1).abs().amax(1) == 0).float().mean().item()
    found.append(Sign("zero_gradients", zero > 0.01, f"{zero:.0%} of the images have a gradient of exactly zero."))
    begun = cross_entropy(oracle.logits(threat.start(x, row, seed)), label, label).mean().item()
    few, many = (_loss_after(oracle, x, label, row, threat, n, seed) for n in (max(1, steps // 5), steps))
    found.append(
        Sign(
            "loss_does_not_rise",
            many < few - 1e-6 or many <= begun + 1e-6,
            f"The loss was {begun:.3g} at random points, {few:.3g} after {max(1, steps // 5)} steps from there and "
            f"{many:.3g} after {steps}.",
        )
    )
    white = strongest(threat.norm)(oracle, x, label, row, threat, margin, steps, seed).broken
    black = square(oracle, x, label, row, threat, queries, seed).broken
    alone = (black & ~white).float().mean().item()
    found.append(
        Sign(
            "black_box_is_better",
            alone > 0.02,
            f"{queries} queries of random search broke {alone:.1%} of the images that {steps} steps of gradients did not.",
        )
    )
    whole = apgd(oracle, x, label, row, Threat(threat.norm, WHOLE[threat.norm]), margin, max(steps, 20), seed).broken
    left = 1 - whole.float().mean().item()
    found.append(
        Sign("unbounded_attack_fails", left > 0.01, f"With no bound at all {left:.1%} of the images were still right.")
    )
    return found


def _loss_after(oracle: Oracle, x: Tensor, label: Tensor, row: Tensor, threat: Threat, steps: int, seed: int) -> float:
    """Mean cross-entropy at the worst points that an ascent of so many steps finds."""
    found = apgd(oracle, x, label, row, threat, steps=steps, seed=seed, go_on=True).images
    return cross_entropy(oracle.logits(found), label, label).mean().item()


class _Calls:
    calls = 0


@contextmanager
def _inner_gradients() -> Iterator[_Calls]:
    """Counts gradients that the model takes by itself."""
    count, grad, backward = _Calls(), torch.autograd.grad, torch.Tensor.backward

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            count.calls += 1
            return function(*args, **kwargs)

        return call

    torch.autograd.grad, torch.Tensor.backward = counted(grad), counted(backward)  # type: ignore[method-assign]
    try:
        yield count
    finally:
        torch.autograd.grad, torch.Tensor.backward = grad, backward  # type: ignore[method-assign]
