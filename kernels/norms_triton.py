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
# Of pixels whose channels lie side by side: elements and channels at once, and about how many programs.
TILE, COLUMNS, PROGRAMS = 4096, 64, 2048


@triton.jit
def _norm_forward(  # type: ignore[no-untyped-def]
    x, h, gate, shift, scale, r, y, means, rstds, of_gate, of_shift, of_scale, tokens, size, eps,
    GATED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    example = row // tokens
    at = tl.arange(0, WIDE)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        weight = tl.load(gate + example * of_gate + at, mask=inside, other=0.0).to(tl.float32)
        value += weight * tl.load(h + row * size + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(r.dtype.element_ty)
        tl.store(r + row * size + at, value, mask=inside)
        value = value.to(tl.float32)
    mean = tl.sum(value, 0) / size
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + eps)
    by = 1.0 + tl.load(scale + example * of_scale + at, mask=inside, other=0.0).to(tl.float32)
    plus = tl.load(shift + example * of_shift + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, (centred * rstd * by + plus).to(y.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    r, h, gate, scale, means, rstds, dr, dy, dx, dh, dgate, dshift, dscale, of_gate, of_scale, tokens, size, chunks,
    GATED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    example, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDE)
    inside = at < size
    by = 1.0 + tl.load(scale + example * of_scale + at, mask=inside, other=0.0).to(tl.float32)
    for_shift = tl.zeros([WIDE], tl.float32)
    for_scale = tl.zeros([WIDE], tl.float32)
    for_gate = tl.zeros([WIDE], tl.float32)
    weight = tl.zeros([WIDE], tl.float32)
    if GATED:
        weight += tl.load(gate + example * of_gate + at, mask=inside, other=0.0).to(tl.float32)
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


def _warps(wide: int) -> int:
    """Of a program that has so many elements at once; as measured on an H200."""
    return max(1, min(8, wide // 512))


def _rows(vectors: Tensor) -> Tensor:
    """Vectors as kernels take them: each in one piece, wherever it begins."""
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Any:
        x = x.contiguous()
        shift, scale = _rows(shift), _rows(scale)
        batch, tokens, size = x.shape
        gated = h is not None and gate is not None
        h, gate = (h.contiguous(), _rows(gate)) if h is not None and gate is not None else (x, shift)
        r, y = torch.empty_like(x) if gated else x, torch.empty_like(x)
        means, rstds = torch.empty(2, batch * tokens, dtype=torch.float32, device=x.device)
        wide = triton.next_power_of_2(size)
        _norm_forward[(batch * tokens,)](
            x, h, gate, shift, scale, r, y, means, rstds, gate.stride(0), shift.stride(0), scale.stride(0), tokens, size,
            eps, GATED=gated, WIDE=wide, num_warps=_warps(wide),
        )  # fmt: skip
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
            r, h, gate, scale, means, rstds, dr, dy, dx, dh, dgate, dshift, dscale, gate.stride(0), scale.stride(0),
            tokens, size, chunks,
            GATED=ctx.gated, ROWS=ROWS, WIDE=ctx.wide, num_warps=_warps(ctx.wide),
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
    around = tl.load(x + begin).to(tl.float32)  # some value of the group, so that the squares do not cancel
    total = tl.zeros([PIECE], tl.float32)
    square = tl.zeros([PIECE], tl.float32)
    for i in range(0, size, PIECE):
        inside = i + at < size
        value = tl.where(inside, tl.load(x + begin + i + at, mask=inside, other=0.0).to(tl.float32) - around, 0.0)
        total += value
        square += value * value
    off = tl.sum(total, 0) / size
    rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(square, 0) / size - off * off, 0.0) + eps)
    mean = around + off
    for i in range(0, size, PIECE):  # from the cache
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


@triton.jit
def _pixel_sums(  # type: ignore[no-untyped-def]
    x, sums, squares, channels, length, each, chunks, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """Of a run of pixels, the channels of which lie side by side: sums by channel, less the channel's first value, so that
    the squares do not cancel."""
    example, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    row, at = tl.arange(0, ROWS)[:, None], one[None, :]
    begin = example * length * channels
    around = tl.load(x + begin + at, mask=at < channels, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    square = tl.zeros([ROWS, WIDE], tl.float32)
    last = tl.minimum((chunk + 1) * each, length)
    for i in range(chunk * each, last, ROWS):
        inside = (i + row < last) & (at < channels)
        value = tl.load(x + begin + (i + row) * channels + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - around, 0.0)
        total += value
        square += value * value
    place = (example * chunks + chunk) * channels + one
    tl.store(sums + place, tl.sum(total, 0), mask=one < channels)
    tl.store(squares + place, tl.sum(square, 0), mask=one < channels)


@triton.jit
def _pixel_statistics(  # type: ignore[no-untyped-def]
    x, sums, squares, means, rstds, channels, groups, length, chunks, eps, CHUNKS: tl.constexpr, EACH: tl.constexpr
):
    """Of one group of one example, from the sums of its channels."""
    program = tl.program_id(0).to(tl.int64)
    example, group, each = program // groups, program % groups, channels // groups
    chunk, at = tl.arange(0, CHUNKS)[:, None], tl.arange(0, EACH)[None, :]
    place = (example * chunks + chunk) * channels + group * each + at
    inside = (chunk < chunks) & (at < each)
    total = tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0)
    square = tl.sum(tl.load(squares + place, mask=inside, other=0.0), 0)
    one = tl.arange(0, EACH)
    around = tl.load(x + example * length * channels + group * each + one, mask=one < each, other=0.0).to(tl.float32)
    by_channel = around + total / length
    mean = tl.sum(tl.where(one < each, by_channel, 0.0), 0) / each
    off = tl.where(one < each, by_channel - mean, 0.0)
    # Σ (x - mean)² of a channel is that about its own mean, and as often the square of what lies between the two.
    spread = tl.sum(square - total * total / length + length * off * off, 0)
    tl.store(means + program, mean)
    tl.store(rstds + program, 1.0 / tl.sqrt(spread / (each * length) + eps))


@triton.jit
def _pixel_affine(means, rstds, weight, bias, example, groups, each, at, there):  # type: ignore[no-untyped-def]
    """Of channels: the number of their group, its mean and 1 / deviation, and their own weights and biases."""
    group = example * groups + at // each
    mean, rstd = tl.load(means + group, mask=there, other=0.0), tl.load(rstds + group, mask=there, other=0.0)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    return group, mean, rstd, w, tl.load(bias + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _pixel_forward(  # type: ignore[no-untyped-def]
    x, weight, bias, y, means, rstds, channels, groups, length, each, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    example, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    row, at = tl.arange(0, ROWS)[:, None], one[None, :]
    begin, there = example * length * channels, at < channels
    _, mean, rstd, w, b = _pixel_affine(means, rstds, weight, bias, example, groups, channels // groups, at, there)
    scale = rstd * w
    last = tl.minimum((chunk + 1) * each, length)
    for i in range(chunk * each, last, ROWS):
        inside = (i + row < last) & there
        place = begin + (i + row) * channels + at
        z = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * scale + b
        tl.store(y + place, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _pixel_gradient(x, dy, place, inside, mean, rstd, w, b):  # type: ignore[no-untyped-def]
    """x̂, and the gradient of x̂ w + b."""
    normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    z = normal * w + b
    s = tl.sigmoid(z)
    return normal, tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * (s + z * s * (1.0 - s))


@triton.jit
def _pixel_backward_sums(  # type: ignore[no-untyped-def]
    x, weight, bias, means, rstds, dy, dweight, dbias, channels, groups, length, each, chunks,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    example, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    row, at = tl.arange(0, ROWS)[:, None], one[None, :]
    begin, there = example * length * channels, at < channels
    _, mean, rstd, w, b = _pixel_affine(means, rstds, weight, bias, example, groups, channels // groups, at, there)
    plain = tl.zeros([ROWS, WIDE], tl.float32)
    times = tl.zeros([ROWS, WIDE], tl.float32)
    last = tl.minimum((chunk + 1) * each, length)
    for i in range(chunk * each, last, ROWS):
        inside = (i + row < last) & there
        normal, g = _pixel_gradient(x, dy, begin + (i + row) * channels + at, inside, mean, rstd, w, b)
        plain += g
        times += tl.where(inside, g * normal, 0.0)
    place = (example * chunks + chunk) * channels + one
    tl.store(dbias + place, tl.sum(plain, 0), mask=one < channels)
    tl.store(dweight + place, tl.sum(times, 0), mask=one < channels)


@triton.jit
def _pixel_backward_groups(  # type: ignore[no-untyped-def]
    weight, dweight, dbias, firsts, seconds, channels, groups, chunks, CHUNKS: tl.constexpr, EACH: tl.constexpr
):
    """Σ g w and Σ g w x̂ over one group of one example."""
    program = tl.program_id(0).to(tl.int64)
    example, group, each = program // groups, program % groups, channels // groups
    chunk, at = tl.arange(0, CHUNKS)[:, None], tl.arange(0, EACH)[None, :]
    place = (example * chunks + chunk) * channels + group * each + at
    inside = (chunk < chunks) & (at < each)
    w = tl.load(weight + group * each + at, mask=at < each, other=0.0).to(tl.float32)
    tl.store(firsts + program, tl.sum(tl.sum(w * tl.load(dbias + place, mask=inside, other=0.0), 0), 0))
    tl.store(seconds + program, tl.sum(tl.sum(w * tl.load(dweight + place, mask=inside, other=0.0), 0), 0))


@triton.jit
def _pixel_backward(  # type: ignore[no-untyped-def]
    x, weight, bias, means, rstds, firsts, seconds, dy, dx, channels, groups, length, each,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    example, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    row, at = tl.arange(0, ROWS)[:, None], one[None, :]
    begin, there = example * length * channels, at < channels
    group, mean, rstd, w, b = _pixel_affine(means, rstds, weight, bias, example, groups, channels // groups, at, there)
    size = channels // groups * length
    first = tl.load(firsts + group, mask=there, other=0.0) / size
    second = tl.load(seconds + group, mask=there, other=0.0) / size
    last = tl.minimum((chunk + 1) * each, length)
    for i in range(chunk * each, last, ROWS):
        inside = (i + row < last) & there
        place = begin + (i + row) * channels + at
        normal, g = _pixel_gradient(x, dy, place, inside, mean, rstd, w, b)
        d = rstd * (g * w - first - normal * second)
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)


def _of_group(size: int) -> dict[str, int]:
    """How a program goes through a group of so many elements; as measured on an H200."""
    return {"PIECE": 8192, "num_warps": 16} if size >= 2**15 else {"PIECE": 2048, "num_warps": 4}


class _Pixels:
    """How pixels whose channels lie side by side are cut into programs: enough of them to fill a GPU."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.examples, self.channels = x.shape[:2]
        self.length, self.groups = x[0, 0].numel(), groups
        wide = min(COLUMNS, triton.next_power_of_2(self.channels))
        rows, columns = TILE // wide, triton.cdiv(self.channels, wide)
        chunks = max(1, PROGRAMS // (self.examples * columns))
        self.each = triton.cdiv(triton.cdiv(self.length, chunks), rows) * rows
        self.chunks = triton.cdiv(self.length, self.each)
        self.grid = (self.examples, self.chunks, columns)
        self.tile = {"ROWS": rows, "WIDE": wide, "num_warps": 4}
        of_group = triton.next_power_of_2(self.channels // groups)
        self.block = {"CHUNKS": triton.next_power_of_2(self.chunks), "EACH": of_group}

    def partial(self, like: Tensor) -> Tensor:
        return torch.empty(2, self.examples, self.chunks, self.channels, dtype=torch.float32, device=like.device)

    def by_group(self, like: Tensor) -> Tensor:
        return torch.empty(2, self.examples * self.groups, dtype=torch.float32, device=like.device)


def _by_pixel(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.by_pixel = _by_pixel(x)
        x = x if ctx.by_pixel else x.contiguous()
        examples, channels = x.shape[:2]
        y = torch.empty_like(x)
        if ctx.by_pixel:
            p = _Pixels(x, groups)
            (sums, squares), (means, rstds) = p.partial(x), p.by_group(x)
            _pixel_sums[p.grid](x, sums, squares, channels, p.length, p.each, p.chunks, **p.tile)
            _pixel_statistics[(examples * groups,)](
                x, sums, squares, means, rstds, channels, groups, p.length, p.chunks, eps, **p.block
            )
            _pixel_forward[p.grid](x, weight, bias, y, means, rstds, channels, groups, p.length, p.each, **p.tile)
        else:
            length = x[0, 0].numel()
            means, rstds = torch.empty(2, examples * groups, dtype=torch.float32, device=x.device)
            _group_forward[(examples * groups,)](
                x,
                weight,
                bias,
                y,
                means,
                rstds,
                channels,
                groups,
                length,
                eps,
                **_of_group(channels // groups * length),
            )
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, means, rstds = ctx.saved_tensors
        examples, channels = x.shape[:2]
        dx = torch.empty_like(x)
        if ctx.by_pixel:
            dy, p = dy.contiguous(memory_format=torch.channels_last), _Pixels(x, ctx.groups)
            (dweight, dbias), (firsts, seconds) = p.partial(x), p.by_group(x)
            _pixel_backward_sums[p.grid](
                x, weight, bias, means, rstds, dy, dweight, dbias, channels, ctx.groups, p.length, p.each, p.chunks,
                **p.tile
            )  # fmt: skip
            _pixel_backward_groups[(examples * ctx.groups,)](
                weight, dweight, dbias, firsts, seconds, channels, ctx.groups, p.chunks, **p.block
            )
            _pixel_backward[p.grid](
                x, weight, bias, means, rstds, firsts, seconds, dy, dx, channels, ctx.groups, p.length, p.each, **p.tile
            )
            dweight, dbias = dweight.sum((0, 1)), dbias.sum((0, 1))
        else:
            dweight, dbias = torch.empty(2, examples, channels, dtype=torch.float32, device=x.device)
            _group_backward[(examples * ctx.groups,)](
                x, weight, bias, means, rstds, dy.contiguous(), dx, dweight, dbias, channels, ctx.groups,
                x[0, 0].numel(), **_of_group(x[0].numel() // ctx.groups),
            )  # fmt: skip
            dweight, dbias = dweight.sum(0), dbias.sum(0)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As `norms.group_norm_silu`; y lies in memory as x does, also pixel by pixel (channels-last)."""
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
