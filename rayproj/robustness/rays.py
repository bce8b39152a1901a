"""RayS: a search along rays by decisions alone, for which scores and gradients may be hidden (Chen and Gu 2020, "RayS: a ray
searching method for hard-label adversarial attack", algorithm 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from rayproj.robustness.oracle import Attacked, Oracle
from rayproj.robustness.threats import Threat, size, wide

CLOSE = 0.02  # of ε: how exactly the radius of a direction is found


def rays(oracle: Oracle, x: Tensor, label: Tensor, threat: Threat, queries: int = 1000) -> Attacked:
    """Each example walks to the nearest border along a vector of signs. Blocks of signs are turned one after the other, from
    all of them at once down to single values; a turn is kept if the border is nearer there, and how near is found by
    bisection. Nothing is drawn, and an example's queries depend on no other.

    Args:
        x: fp32 [B, C, H, W] in [0, 1].
    """
    spent = torch.full_like(label, queries)
    found = Attacked(x.clone(), torch.zeros_like(label, dtype=torch.bool), spent)
    number, values = torch.arange(len(x), device=x.device), x[0].numel()
    place, far = torch.arange(values, device=x.device), size(torch.ones_like(x[:1]), threat.norm)
    direction = torch.ones_like(x).flatten(1)
    radius = torch.full((len(x),), torch.inf, device=x.device)  # of the border in `direction`
    level, block = torch.zeros_like(label), torch.full_like(label, -1)  # the first ray is one with nothing turned
    low, high, bisecting = torch.zeros_like(radius), radius.clone(), torch.zeros_like(label, dtype=torch.bool)
    for query in range(queries):
        width = -(-values // 2**level)
        turned = (place >= (block * width)[:, None]) & (place < ((block + 1) * width)[:, None])
        trial = torch.where(turned, -direction, direction)
        asked = torch.where(bisecting, (low + high) / 2, radius.minimum(far))
        step = (asked / size(trial, threat.norm))[:, None] * trial
        point = (x[number] + step.view_as(x[number])).clamp(0, 1)
        fooled = oracle.fooled(point, oracle.logits(point), label[number])
        low = torch.where(bisecting & ~fooled, asked, torch.where(bisecting, low, 0.0))
        high, passed = torch.where(fooled, asked, high), ~bisecting & ~fooled
        bisecting = bisecting | fooled
        ended = bisecting & (high - low <= CLOSE * threat.eps)
        radius = torch.where(ended, high, radius)
        direction = torch.where(ended[:, None], trial, direction)
        bisecting = bisecting & ~ended
        block = block + (ended | passed)
        last = block * width >= values
        level, block = level + last, torch.where(last, 0, block)
        if (broken := fooled & (asked <= threat.eps)).any():
            found.images[number[broken]], found.broken[number[broken]] = point[broken], True
            spent[number[broken]] = query + 1
            state = (number, direction, radius, level, block, low, high, bisecting)
            number, direction, radius, level, block, low, high, bisecting = (one[~broken] for one in state)
        if not len(number):
            break
    # Of the rest the point at the edge of the ball on the best ray.
    edge = wide((threat.eps / size(direction, threat.norm)), x[number]) * direction.view_as(x[number])
    found.images[number] = (x[number] + edge).clamp(0, 1)
    return found
