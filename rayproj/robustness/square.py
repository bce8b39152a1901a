"""Square attack: random search with square changes at the edge of the ball, which sees scores alone (Andriushchenko et al.
2020, algorithms 1-3; for ℓ1 Croce and Hein 2021, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from rayproj import keyed
from rayproj.robustness.losses import margin
from rayproj.robustness.oracle import Attacked, Oracle
from rayproj.robustness.threats import Norm, Threat, size, wide

SHARE = 0.8  # of the image that the first squares cover
AT_ONCE = 64  # queries whose random numbers are drawn together
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000, after which they are half as large


def share_at(query: int) -> float:
    """Share of the image that a square covers."""
    return SHARE / 2 ** sum(query > at for at in HALVED_AT)


def square(
    oracle: Oracle, x: Tensor, label: Tensor, row: Tensor, threat: Threat, queries: int = 5000, seed: int = 0
) -> Attacked:
    """Every example draws its own squares, keyed by (seed, row, query): what comes of it depends on no other. Against a
    random model none leaves the search early, which one wrong answer of many would have it do.

    Args:
        x: fp32 [B, C, H, W] in [0, 1].
        row: int64 [B, 3], of which the last is left to the queries.
    """
    asked = torch.full_like(label, queries)
    found = Attacked(x.clone(), torch.zeros_like(label, dtype=torch.bool), asked)
    number = torch.arange(len(x), device=x.device)
    best = _stripes(x, row, threat, seed) if threat.norm is Norm.linf else _tiles(x, row, threat, seed)
    value = torch.full((len(x),), -torch.inf, device=x.device)
    proposal, change = best, _square if threat.norm is Norm.linf else _moved_mass
    for query in range(queries):
        logits = oracle.logits(proposal)
        loss = margin(logits, label[number], label[number])
        if oracle.random and query:  # the value of the point so far is that of its luckiest draw, and is asked anew
            value = margin(oracle.logits(best), label[number], label[number])
        better = loss > value
        value, best = torch.maximum(loss, value), torch.where(wide(better, best), proposal, best)
        broken = value > 0
        if broken.any() and not oracle.random:
            found.images[number[broken]], found.broken[number[broken]] = best[broken], True
            asked[number[broken]] = query + 1
            number, value, best = number[~broken], value[~broken], best[~broken]
        if not len(number):
            return found
        if query % AT_ONCE == 0:
            places, signs = _drawn(row, query, x.shape[1], seed)
        at = query % AT_ONCE
        proposal = change(x[number], best, places[number, at], signs[number, at], threat, share_at(query))
    found.images[number] = best
    if oracle.random:
        found.broken = oracle.fooled(best, oracle.logits(best), label)
    return found


def _drawn(row: Tensor, query: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """For this query and those after it the uniforms that say where [B, AT_ONCE, 5], and the signs [B, AT_ONCE, C, 1, 1]."""
    later = torch.arange(query + 1, query + 1 + AT_ONCE, device=row.device)
    rows = torch.cat([row[:, None, :2].expand(-1, AT_ONCE, -1), later[None, :, None].expand(len(row), -1, 1)], 2)
    places = keyed.uniform(seed, "square", rows.flatten(0, 1), (5,)).unflatten(0, (-1, AT_ONCE))
    return places, _signs((channels, 1, 1), rows.flatten(0, 1), seed, "sign").unflatten(0, (-1, AT_ONCE))


def _signs(shape: tuple[int, ...], row: Tensor, seed: int, stream: str) -> Tensor:
    return (keyed.uniform(seed, stream, row, shape) < 0.5).float() * 2 - 1


def _window(draw: Tensor, side: int, height: int, width: int) -> Tensor:
    """bool [B, 1, H, W]: squares whose places are given by uniforms [B, 2]."""
    top = (draw[:, 0] * (height - side + 1)).long()[:, None]
    left = (draw[:, 1] * (width - side + 1)).long()[:, None]
    y, x = torch.arange(height, device=draw.device), torch.arange(width, device=draw.device)
    rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _stripes(x: Tensor, row: Tensor, threat: Threat, seed: int) -> Tensor:
    """Vertical stripes of ± ε in each channel."""
    _, channels, _, width = x.shape
    return threat.project(x, x + threat.eps * _signs((channels, 1, width), row, seed, "stripes"))


def _square(x: Tensor, best: Tensor, place: Tensor, sign: Tensor, threat: Threat, share: float) -> Tensor:
    """One square at ± ε in each channel, the rest as it was."""
    height, width = x.shape[2:]
    side = min(max(round((share * height * width) ** 0.5), 1), height, width)
    window = _window(place, side, height, width)
    return threat.project(x, torch.where(window, x + threat.eps * sign, best))


def bump(height: int, width: int, power: int) -> Tensor:
    """[height, width]: nested rectangles around a centre, the k-th adding 1 / k^power (ibid., eq. 2), half of a change."""
    found = torch.zeros(height, width)
    top, left = height // 2, width // 2
    bottom, right = top, left
    for k in range(1, max(height, width) // 2 + 2):
        found[max(top, 0) : bottom + 1, max(left, 0) : right + 1] += 1 / k**power
        top, left, bottom, right = top - 1, left - 1, bottom + 1, right + 1
    return found


def pair_of_bumps(side: int, power: int, norm: Norm) -> Tensor:
    """[side, side] of norm 1: one bump up and one down, side by side (ibid., eq. 3)."""
    half = side // 2
    found = torch.cat([bump(half, side, power), -bump(side - half, side, power)])
    return found / size(found[None], norm)


def _tiles(x: Tensor, row: Tensor, threat: Threat, seed: int) -> Tensor:
    """A grid of bumps of random signs, at the edge of the ball."""
    count, channels, height, width = x.shape
    power, tile = (2 if threat.norm is Norm.l2 else 4), max(height // 5, 1)
    across, down = width // tile, height // tile
    one = bump(tile, tile, power).to(x)
    signs = _signs((channels, down, across), row, seed, "tiles")
    delta = torch.zeros_like(x)
    filled = torch.einsum("bcij,uv->bciujv", signs, one).reshape(count, channels, down * tile, across * tile)
    delta[:, :, : down * tile, : across * tile] = filled
    return threat.project(x, x + delta / wide(size(delta, threat.norm), x) * threat.eps)


def _moved_mass(x: Tensor, best: Tensor, draw: Tensor, sign: Tensor, threat: Threat, share: float) -> Tensor:
    """The change in one square goes to another, with what is left of the radius (ibid., algorithm 3)."""
    _, channels, height, width = x.shape
    side = max(round((share * height * width) ** 0.5), 3)
    side = min(side + (side % 2 == 0), height - (height % 2 == 0), width - (width % 2 == 0))
    power, p = (2, 2.0) if threat.norm is Norm.l2 else (4, 1.0)
    into = _window(draw[:, :2], side, height, width)
    emptied = _window(draw[:, 2:4], side, height, width)
    delta = best - x

    def mass(values: Tensor) -> Tensor:
        """Σ |v|^p of each channel, [B, C, 1, 1]."""
        return (values.abs() ** p).sum((2, 3), keepdim=True)

    freed = mass(torch.where(into | emptied, delta, 0.0))
    unused = (threat.eps**p - mass(delta).sum(1, keepdim=True)).clamp(min=0) / channels
    shape = pair_of_bumps(side, power, threat.norm).to(x)
    turned = torch.where(wide(draw[:, 4] < 0.5, shape[None]), shape, shape.T)[:, None]
    kept = delta[into.expand_as(delta)].view(len(x), channels, side, side)
    new = sign * turned + kept / (mass(kept) ** (1 / p)).clamp(min=1e-12)
    new = new / (mass(new) ** (1 / p)).clamp(min=1e-12) * (freed + unused) ** (1 / p)
    changed = torch.where(into | emptied, 0.0, delta)
    changed[into.expand_as(delta)] = new.flatten()
    scale = wide(threat.eps / size(changed, threat.norm).clamp(min=1e-12), x)
    return threat.project(x, x + changed * scale)
