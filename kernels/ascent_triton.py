"""One step of APGD in one kernel; the reference is `ascent`.

For ℓ∞ every value is by itself: 20 bytes of each are moved, where torch's dozen of operations move 150. For ℓ2 a program
goes over an image as often as a norm is needed, three times more, out of the cache.

Needs a GPU, or TRITON_INTERPRET=1, with which Triton runs the kernel's own code on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024  # values at once


@triton.jit
def _in_box(values):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(values, 0.0), 1.0)


@triton.jit
def _signed(x, point, before, gradient, step, out, size, eps, momentum, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(0).to(tl.int64)
    inside = tl.program_id(1) * PIECE + tl.arange(0, PIECE) < size
    at = image * size + tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    centre, here = tl.load(x + at, mask=inside, other=0.0), tl.load(point + at, mask=inside, other=0.0)
    slope = tl.load(gradient + at, mask=inside, other=0.0)
    low, high = centre - eps, centre + eps
    eta = tl.load(step + image)
    z = here + eta * ((slope > 0).to(tl.float32) - (slope < 0).to(tl.float32))
    z = _in_box(tl.minimum(tl.maximum(z, low), high))
    if momentum < 1:
        last = tl.load(before + at, mask=inside, other=0.0)
        z = here + momentum * (z - here) + (1 - momentum) * (here - last)
        z = _in_box(tl.minimum(tl.maximum(z, low), high))
    tl.store(out + at, z, mask=inside)


@triton.jit
def _first(centre, here, slope, eta, scale):  # type: ignore[no-untyped-def]
    """z of an image whose move from the centre is scaled by so much."""
    return _in_box(centre + (here + eta * slope - centre) * scale)


@triton.jit
def _normed(x, point, before, gradient, step, out, size, eps, momentum, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(0).to(tl.int64)
    base = image * size
    total = tl.zeros((PIECE,), tl.float32)
    for begin in range(0, size, PIECE):
        inside = begin + tl.arange(0, PIECE) < size
        slope = tl.load(gradient + base + begin + tl.arange(0, PIECE), mask=inside, other=0.0)
        total += slope * slope
    eta = tl.load(step + image) / tl.maximum(tl.sqrt(tl.sum(total)), 1e-12)
    total = tl.zeros((PIECE,), tl.float32)
    for begin in range(0, size, PIECE):
        inside = begin + tl.arange(0, PIECE) < size
        at = base + begin + tl.arange(0, PIECE)
        moved = tl.load(point + at, mask=inside, other=0.0) + eta * tl.load(gradient + at, mask=inside, other=0.0)
        moved -= tl.load(x + at, mask=inside, other=0.0)
        total += moved * moved
    scale = tl.minimum(eps / tl.maximum(tl.sqrt(tl.sum(total)), 1e-12), 1.0)
    again = 1.0
    if momentum < 1:
        total = tl.zeros((PIECE,), tl.float32)
        for begin in range(0, size, PIECE):
            inside = begin + tl.arange(0, PIECE) < size
            at = base + begin + tl.arange(0, PIECE)
            centre, here = tl.load(x + at, mask=inside, other=0.0), tl.load(point + at, mask=inside, other=0.0)
            z = _first(centre, here, tl.load(gradient + at, mask=inside, other=0.0), eta, scale)
            last = tl.load(before + at, mask=inside, other=0.0)
            moved = here + momentum * (z - here) + (1 - momentum) * (here - last) - centre
            total += tl.where(inside, moved * moved, 0.0)
        again = tl.minimum(eps / tl.maximum(tl.sqrt(tl.sum(total)), 1e-12), 1.0)
    for begin in range(0, size, PIECE):
        inside = begin + tl.arange(0, PIECE) < size
        at = base + begin + tl.arange(0, PIECE)
        centre, here = tl.load(x + at, mask=inside, other=0.0), tl.load(point + at, mask=inside, other=0.0)
        z = _first(centre, here, tl.load(gradient + at, mask=inside, other=0.0), eta, scale)
        if momentum < 1:
            last = tl.load(before + at, mask=inside, other=0.0)
            moved = here + momentum * (z - here) + (1 - momentum) * (here - last) - centre
            z = _in_box(centre + moved * again)
        tl.store(out + at, z, mask=inside)


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
    """As `ascent.move`."""
    flat = [t.contiguous() for t in (x, point, before, gradient)]
    assert all(t.dtype is torch.float32 and t.shape == x.shape for t in flat)
    out, size = torch.empty_like(flat[0]), x[0].numel()
    told = (*flat, step.float().contiguous(), out, size, float(eps), float(momentum))
    if euclidean:
        _normed[(len(x),)](*told, PIECE=PIECE)
    else:
        _signed[(len(x), triton.cdiv(size, PIECE))](*told, PIECE=PIECE)
    return out
