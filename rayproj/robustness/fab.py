"""FAB: the nearest misclassified point, by steps onto the linearised decision boundary (Croce and Hein 2020, "Minimally
distorted adversarial examples with a fast adaptive boundary attack", algorithm 1), towards one target class."""

from __future__ import annotations

import torch
from torch import Tensor

from rayproj.robustness.losses import target_margin
from rayproj.robustness.oracle import Attacked, Oracle
from rayproj.robustness.threats import Norm, Threat, room, size, wide

OVERSHOOT, BACKWARD, BIAS = 1.05, 0.9, 0.1  # η, β and the largest α


def onto_plane(x: Tensor, normal: Tensor, value: Tensor, norm: Norm) -> Tensor:
    """The smallest moves δ [B, ...] in a norm with value + <normal, δ> = 0 and x + δ in [0, 1]; where the box does not
    reach the plane, to its corner nearest to it.

    Each value moves by at most the room it has, in the direction that lessens |value|: for ℓ∞ all by the same, for ℓ2 in
    proportion to the normal, for ℓ1 those with the largest |normal| first. How far is found exactly.
    """
    direction = -normal * wide(value.sign(), normal)
    slope, cap = normal.flatten(1).abs().double(), room(x, direction).flatten(1).double()
    needed = value.abs().double()[:, None]
    if norm is Norm.l1:
        slope_of, order = slope.sort(1, descending=True)
        gain = slope_of * cap.gather(1, order)
        left = (needed - (gain.cumsum(1) - gain)).clamp(min=0)
        moved = torch.minimum(left / slope_of.clamp(min=1e-30), cap.gather(1, order))
        found = torch.zeros_like(slope).scatter(1, order, torch.where(slope_of > 0, moved, 0.0))
    else:
        found = _moved(slope, slope if norm is Norm.l2 else None, cap, needed)
    return found.to(x).view_as(x) * direction.sign()


def _moved(slope: Tensor, rate: Tensor | None, cap: Tensor, needed: Tensor) -> Tensor:
    """min(rate t, cap) [B, n] with the least t at which Σ slope min(rate t, cap) is what is needed [B, 1]; cap if none is.

    The sum is concave and linear between its knots, so that Newton's method from the left never steps over t, and is there
    once no knot lies between: exact after a few steps, where sorting the knots takes longer.

    Args:
        rate: None: all move at the same rate.
    """
    speed_of = slope if rate is None else slope * rate
    t = torch.zeros_like(needed)
    for _ in range(slope.shape[1] + 1):
        moved = torch.minimum(t if rate is None else rate * t, cap)
        left = needed - (slope * moved).sum(1, keepdim=True)
        speed = torch.where(moved < cap, speed_of, 0.0).sum(1, keepdim=True)
        goes_on = (left > 1e-14 * needed) & (speed > 0)
        if not goes_on.any():
            break
        t = torch.where(goes_on, t + left / speed.clamp(min=1e-300), t)
    return torch.where(slope > 0, moved, 0.0)


def fab(
    oracle: Oracle, x: Tensor, label: Tensor, target: Tensor, threat: Threat, steps: int = 100, go_on: bool = False
) -> Attacked:
    """The nearest points found that are misclassified; broken are those inside the ball.

    Args:
        x: fp32 [B, C, H, W] in [0, 1].
        target: int64 [B]: towards the boundary of which class.
        go_on: with examples that are broken, for points that are nearer still; else they leave the batch.
    """
    found = Attacked(x.clone(), torch.zeros_like(label, dtype=torch.bool))
    nearest = torch.full((len(x),), torch.inf, device=x.device)
    number, point = torch.arange(len(x), device=x.device), x
    for _ in range(steps):
        if not len(number):
            break
        home = x[number]
        value, normal, _ = oracle.ask(point, label[number], target[number], target_margin)
        # Where the margin z_t - z_y is linearised as value + <normal, z - point>, its zero is the boundary.
        there = onto_plane(point, normal, value, threat.norm)
        at_home = value + ((home - point) * normal).flatten(1).sum(1)
        nearby = onto_plane(home, normal, at_home, threat.norm)
        a, b = size(there, threat.norm), size(nearby, threat.norm)
        bias = wide((a / (a + b).clamp(min=1e-12)).clamp(max=BIAS), point)
        point = (1 - bias) * (point + OVERSHOOT * there) + bias * (home + OVERSHOOT * nearby)
        point = point.clamp(0, 1)
        wrong = oracle.logits(point).argmax(1) != label[number]
        distance = size(point - home, threat.norm)
        nearer = wrong & (distance < nearest[number])
        found.images[number[nearer]], nearest[number[nearer]] = point[nearer], distance[nearer]
        point = torch.where(wide(wrong, point), home + BACKWARD * (point - home), point)
        found.broken = nearest <= threat.eps
        if not go_on:
            left = ~found.broken[number]
            number, point = number[left], point[left]
    return found
