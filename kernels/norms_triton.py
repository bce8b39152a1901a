"""Triton kernels of what `norms` writes out: one pass over the activations where torch takes several.

Needs a GPU, or TRITON_INTERPRET=1, with which Triton runs the kernels' own code on the CPU.

A layer norm with what is around it reads and writes each activation once; torch takes six passes, with gate and residual
eleven. GroupNorm + SiLU reads twice and writes once, for five passes of torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens that one program of a backward takes, so that sums over tokens are made in two stages
PIECE = 1024  # elements at once


@triton.jit
def _norm_forward(  # type: ignore[no-untyped-def]
    x, h, gate, shift, scale, r, y, means, rstds, tokens, size, eps, GATED: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    example = row // tokens
    at = tl.arange(0, WIDE)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        weight = tl.load(gate + example * size + at, mask=inside, other=0.0).to(tl.float32)
        value += weight * tl.load(h + row * size + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(r.dtype.element_ty)
        tl.store(r + row * size + at, value, mask=inside)
        value = value.to(tl.float32)
    mean = tl.sum(value, 0) / size
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + eps)
    by = 1.0 + tl.load(scale + example * size + at, mask=inside, other=0.0).to(tl.float32)
    plus = tl.load(shift + example * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, (centred * rstd * by + plus).to(y.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    r, h, gate, scale, means, rstds, dr, dy, dx, dh, dgate, dshift, dscale, tokens, size, chunks,
    GATED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    example, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDE)
    inside = at < size
    by = 1.0 + tl.load(scale + example * size + at, mask=inside, other=0.0).to(tl.float32)
    for_shift = tl.zeros([WIDE], tl.float32)
    for_scale = tl.zeros([WIDE], tl.float32)
    for_gate = tl.zeros([WIDE], tl.float32)
    weight = tl.zeros([WIDE], tl.float32)
    if GATED:
        weight += tl.load(gate + example * size + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(ROWS):
        token = chunk * ROWS + i
        if token < tokens:
            row = example * tokens + token
            g = tl.load(dy + row * size + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(r + row * size + at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstds + row)
            normal = tl.where(inside, (value - tl.load(means + row)) * rstd, 0.0)
            for_shift += g
            for_scale += g * normal
            g *= by
            # d x̂ without what the mean and the variance take back.
            d = rstd * (g - tl.sum(g, 0) / size - normal * (tl.sum(g * normal, 0) / size))
            if GATED:
                d += tl.load(dr + row * size + at, mask=inside, other=0.0).to(tl.float32)
                other = tl.load(h + row * size + at, mask=inside, other=0.0).to(tl.float32)
                for_gate += d * other
                tl.store(dh + row * size + at, (d * weight).to(dh.dtype.element_ty), mask=inside)
            tl.store(dx + row * size + at, d.to(dx.dtype.element_ty), mask=inside)
    place = (example * chunks + chunk) * size + at
    tl.store(dshift + place, for_shift, mask=inside)
    tl.store(dscale + place, for_scale, mask=inside)
    if GATED:
        tl.store(dgate + place, for_gate, mask=inside)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Any:
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        batch, tokens, size = x.shape
        gated = h is not None and gate is not None
        h, gate = (h.contiguous(), gate.contiguous()) if h is not None and gate is not None else (x, shift)
        r, y = torch.empty_like(x) if gated else x, torch.empty_like(x)
        means, rstds = torch.empty(2, batch * tokens, dtype=torch.float32, device=x.device)
        wide = triton.next_power_of_2(size)
        _norm_forward[(batch * tokens,)](
            x, h, gate, shift, scale, r, y, means, rstds, tokens, size, eps, GATED=gated, WIDE=wide
        )
        ctx.save_for_backward(r, h, gate, shift, scale, means, rstds)
        ctx.gated, ctx.wide = gated, wide
        return (r, y) if gated else y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        r, h, gate, shift, scale, means, rstds = ctx.saved_tensors
        dy, dr = gradients[-1].contiguous(), gradients[0].contiguous()
        batch, tokens, size = r.shape
        chunks = triton.cdiv(tokens, ROWS)
        dx, dh = torch.empty_like(r), torch.empty_like(r) if ctx.gated else r
        dshift, dscale, dgate = torch.empty(3, batch, chunks, size, dtype=torch.float32, device=r.device)
        _norm_backward[(batch, chunks)](
            r, h, gate, scale, means, rstds, dr, dy, dx, dh, dgate, dshift, dscale, tokens, size, chunks,
            GATED=ctx.gated, ROWS=ROWS, WIDE=ctx.wide,
        )  # fmt: skip
        of_shift, of_scale = dshift.sum(1).to(shift.dtype), dscale.sum(1).to(scale.dtype)
        if not ctx.gated:
            return dx, None, None, of_shift, of_scale, None
        return dx, dh, dgate.sum(1).to(gate.dtype), of_shift, of_scale, None


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """As `norms.layer_norm_modulate`."""
    found: Tensor = _GatedNorm.apply(x, None, None, shift, scale, eps)
    return found


def gated_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As `norms.gated_norm_modulate`."""
    found: tuple[Tensor, Tensor] = _GatedNorm.apply(x, h, gate, shift, scale, eps)
    return found


@triton.jit
def _group_forward(  # type: ignore[no-untyped-def]
    x, weight, bias, y, means, rstds, channels, groups, length, eps, PIECE: tl.constexpr
):
    """Of one group of one example: its sums, and then its values."""
    program = tl.program_id(0).to(tl.int64)
    group, each = program % groups, channels // groups
    begin, size = program * each * length, each * length
    at = tl.arange(0, PIECE)
    total = tl.zeros([PIECE], tl.float32)
    for i in range(0, size, PIECE):
        total += tl.load(x + begin + i + at, mask=i + at < size, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / size
    total = tl.zeros([PIECE], tl.float32)
    for i in range(0, size, PIECE):  # from the cache; the sum of squares alone would cancel
        inside = i + at < size
        centred = tl.where(inside, tl.load(x + begin + i + at, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        total += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / size + eps)
    for i in range(0, size, PIECE):
        inside = i + at < size
        channel = group * each + (i + at) // length
        value = (tl.load(x + begin + i + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        z = value * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        z += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + begin + i + at, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=inside)
    tl.store(means + program, mean)
    tl.store(rstds + program, rstd)


@triton.jit
def _group_backward(  # type: ignore[no-untyped-def]
    x, weight, bias, means, rstds, dy, dx, dweight, dbias, channels, groups, length, PIECE: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    example, group, each = program // groups, program % groups, channels // groups
    begin, size = program * each * length, each * length
    mean, rstd = tl.load(means + program), tl.load(rstds + program)
    at = tl.arange(0, PIECE)
    first = 0.0  # Σ g w and Σ g w x̂ over the group
    second = 0.0
    for c in range(each):
        channel = group * each + c
        w, b = tl.load(weight + channel).to(tl.float32), tl.load(bias + channel).to(tl.float32)
        plain = tl.zeros([PIECE], tl.float32)
        times = tl.zeros([PIECE], tl.float32)
        for i in range(0, length, PIECE):
            inside = i + at < length
            place = begin + c * length + i + at
            normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            z = normal * w + b
            s = tl.sigmoid(z)
            g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * (s + z * s * (1.0 - s))
            plain += g
            times += tl.where(inside, g * normal, 0.0)
        of_bias, of_weight = tl.sum(plain, 0), tl.sum(times, 0)
        tl.store(dbias + example * channels + channel, of_bias)
        tl.store(dweight + example * channels + channel, of_weight)
        first += of_bias * w
        second += of_weight * w
    for i in range(0, size, PIECE):
        inside = i + at < size
        channel = group * each + (i + at) // length
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        normal = (tl.load(x + begin + i + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        z = normal * w + b
        s = tl.sigmoid(z)
        g = tl.load(dy + begin + i + at, mask=inside, other=0.0).to(tl.float32) * (s + z * s * (1.0 - s)) * w
        d = rstd * (g - first / size - normal * (second / size))
        tl.store(dx + begin + i + at, d.to(dx.dtype.element_ty), mask=inside)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        examples, channels = x.shape[:2]
        length, y = x[0, 0].numel(), torch.empty_like(x)
        means, rstds = torch.empty(2, examples * groups, dtype=torch.float32, device=x.device)
        _group_forward[(examples * groups,)](
            x, weight, bias, y, means, rstds, channels, groups, length, eps, PIECE=PIECE
        )
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, means, rstds = ctx.saved_tensors
        examples, channels = x.shape[:2]
        dx = torch.empty_like(x)
        dweight, dbias = torch.empty(2, examples, channels, dtype=torch.float32, device=x.device)
        _group_backward[(examples * ctx.groups,)](
            x, weight, bias, means, rstds, dy.contiguous(), dx, dweight, dbias, channels, ctx.groups, x[0, 0].numel(),
            PIECE=PIECE,
        )  # fmt: skip
        return dx, None, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), None


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As `norms.group_norm_silu`."""
    found: Tensor = _GroupNormSilu.apply(x, groups, weight, bias, eps)
    return found


@triton.jit
def _guided(x, under, base, out, size, guidance, keep, gain, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    inside = at < size
    without = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    drawn = without + guidance * (tl.load(under + at, mask=inside, other=0.0).to(tl.float32) - without)
    tl.store(out + at, keep * tl.load(x + at, mask=inside, other=0.0) + gain * drawn, mask=inside)


def guided_update(x: Tensor, under: Tensor, base: Tensor, guidance: float, keep: float, gain: float) -> Tensor:
    """As `norms.guided_update`, of x in fp32."""
    x, under, base = x.contiguous(), under.contiguous(), base.contiguous()
    assert x.dtype is torch.float32
    out = torch.empty_like(x)
    _guided[(triton.cdiv(x.numel(), PIECE),)](x, under, base, out, x.numel(), guidance, keep, gain, PIECE=PIECE)
    return out
