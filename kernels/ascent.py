"""One step of APGD, all in one: steepest ascent, projection, momentum, projection. The reference of `ascent_triton`."""

from __future__ import annotations

import torch
from torch import Tensor


def move(
    x: Tensor,
    point: Tensor,
    before: Tensor,
    gradient: Tensor,
    step: Tensor,
    eps: float,
    momentum: float,
    euclidean: bool,
) -> Tensor:
    """The next points in ℓ∞ or ℓ2 balls cut at [0, 1] (Croce and Hein 2020, algorithm 1, lines 7 and 8):
    P(x_k + α (z - x_k) + (1 - α) (x_k - x_{k-1})) with z = P(x_k + η s), s being the sign or the normed gradient.

    Args:
        x, point, before, gradient: fp32 [B, C, H, W]: centres, x_k, x_{k-1}, gradient at x_k.
        step: fp32 [B]: η.
        momentum: α; 1 leaves x_{k-1} out.
    """
    at = step.view(-1, *[1] * (x.dim() - 1))
    direction = gradient / _norm(gradient).clamp(min=1e-12) if euclidean else gradient.sign()
    found = projected(x, point + at * direction, eps, euclidean)
    if momentum == 1:
        return found
    return projected(x, point + momentum * (found - point) + (1 - momentum) * (point - before), eps, euclidean)


def projected(x: Tensor, z: Tensor, eps: float, euclidean: bool) -> Tensor:
    """Points brought into the ball around `x` and the box [0, 1]: for ℓ∞ the nearest ones, for ℓ2 first onto the ball
    and then onto the box, which is inside both."""
    if not euclidean:
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
    delta = z - x
    return (x + delta * (eps / _norm(delta).clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def _norm(values: Tensor) -> Tensor:
    """Euclidean, of each example, [B, 1, ...]."""
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.dim() - 1))
