"""The functions of `gram` as Triton kernels, for fp32 on a GPU; of other dtypes, the operands are cast first.

Needs a GPU, or TRITON_INTERPRET=1, with which Triton runs the kernels' own code on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH = 64, 32  # tokens of a tile; features that are multiplied at a time
WIDE = 1024  # elements of a row that a program reads at a time


@triton.jit
def _tile(data, at, first, second, tokens, depth, row, column, TILE: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of the Gram matrix of data [tokens, depth] that begins at `at`."""
    i = first * TILE + tl.arange(0, TILE)
    j = second * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for begin in range(0, depth, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        a = tl.load(
            data + at + i[:, None] * row + k[None, :] * column,
            mask=(i[:, None] < tokens) & (k[None, :] < depth),
            other=0.0,
        )
        b = tl.load(
            data + at + j[None, :] * row + k[:, None] * column,
            mask=(j[None, :] < tokens) & (k[:, None] < depth),
            other=0.0,
        )
        # Not TF32: three digits of a norm would be a looser bound on an example's influence than the one that is claimed.
        total += tl.dot(a, b, input_precision="ieee")
    return total


@triton.jit
def _linear_gram(  # type: ignore[no-untyped-def]
    x, g, out, tokens, d, p, x0, x1, x2, g0, g1, g2, tiles, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """The part of one pair of tiles of tokens: both Gram matrices are symmetric, so the pair counts for its mirror too."""
    example, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, second = pair // tiles, pair % tiles
    if second <= first:
        inputs = _tile(x, example * x0, first, second, tokens, d, x1, x2, TILE, DEPTH)
        outputs = _tile(g, example * g0, first, second, tokens, p, g1, g2, TILE, DEPTH)
        part = tl.sum(inputs * outputs)
        part = tl.where(first == second, part, 2 * part)
        tl.store(out + example * tiles * tiles + pair, part)


def linear_gram_norm(x: Tensor, g: Tensor) -> Tensor:
    """As `gram.linear_gram_norm`; no Gram matrix is written to memory."""
    x, g = x.float(), g.float()
    size, tokens, d = x.shape
    tiles = triton.cdiv(tokens, TILE)
    # Each part in a place of its own: sums in an order that chance decides would differ from run to run.
    parts = x.new_zeros(size, tiles * tiles)
    _linear_gram[(size, tiles * tiles)](
        x, g, parts, tokens, d, g.shape[2], *x.stride(), *g.stride(), tiles, TILE=TILE, DEPTH=DEPTH
    )
    return parts.sum(1)


@triton.jit
def _shifted_product(  # type: ignore[no-untyped-def]
    pixels, outputs, parts, tokens, sites, area, height, width, up, across, blocks,
    pad_rows, pad_columns, stride_rows, stride_columns, dilate_rows, dilate_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ over a block of pairs of output positions (t, s) of outputs[t, s] times the sum over the kernel's offsets δ of
    pixels[t + δ, s + δ]."""
    example, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = block.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = pair < tokens.to(tl.int64) * tokens
    t, s = pair // tokens, pair % tokens
    area_out = up * across
    view_t, view_s = t // area_out, s // area_out
    row_t, row_s = (t % area_out) // across, (s % area_out) // across
    column_t, column_s = t % across, s % across
    summed = tl.zeros((TILE,), tl.float32)
    for i in range(ROWS):
        y_t, y_s = row_t * stride_rows + i * dilate_rows - pad_rows, row_s * stride_rows + i * dilate_rows - pad_rows
        for j in range(COLUMNS):
            shift = j * dilate_columns - pad_columns
            x_t, x_s = column_t * stride_columns + shift, column_s * stride_columns + shift
            there = inside & (y_t >= 0) & (y_t < height) & (y_s >= 0) & (y_s < height)
            there = there & (x_t >= 0) & (x_t < width) & (x_s >= 0) & (x_s < width)
            at_t = view_t * area + y_t * width + x_t
            at_s = view_s * area + y_s * width + x_s
            summed += tl.load(pixels + (example * sites + at_t) * sites + at_s, mask=there, other=0.0)
    value = tl.load(outputs + example * tokens * tokens + pair, mask=inside, other=0.0)
    tl.store(parts + example * blocks + block, tl.sum(summed * value))


def conv_gram_norm(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """As `gram.conv_gram_norm`: the two products are cuBLAS's, their shifted sum and product are one pass of a kernel."""
    x, g = x.float(), g.float()
    size, _, _, height, width = x.shape
    up, across = g.shape[3:]
    pixels, outputs = x.transpose(1, 2).flatten(2), g.transpose(1, 2).flatten(2)
    inputs, products = (pixels.mT @ pixels).contiguous(), (outputs.mT @ outputs).contiguous()
    tokens, sites = outputs.shape[2], pixels.shape[2]
    blocks = triton.cdiv(tokens * tokens, WIDE)
    parts = x.new_zeros(size, blocks)
    _shifted_product[(size, blocks)](
        inputs, products, parts, tokens, sites, height * width, height, width, up, across, blocks,
        *padding, *stride, *dilation, ROWS=kernel[0], COLUMNS=kernel[1], TILE=WIDE,
    )  # fmt: skip
    return parts.sum(1)


@triton.jit
def _norm_square(gradients, parts, numel, row, blocks, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    example, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block.to(tl.int64) * WIDE + tl.arange(0, WIDE)
    value = tl.load(gradients + example * row + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(parts + example * blocks + block, tl.sum(value * value))


def norm_square(gradients: Tensor) -> Tensor:
    """As `gram.norm_square`; sums of blocks, then their sum, in a fixed order."""
    gradients = gradients if gradients.stride(1) == 1 else gradients.contiguous()
    size, numel = gradients.shape
    blocks = triton.cdiv(numel, WIDE)
    parts = torch.zeros(size, blocks, device=gradients.device)
    _norm_square[(size, blocks)](gradients, parts, numel, gradients.stride(0), blocks, WIDE=WIDE)
    return parts.sum(1)


@triton.jit
def _accumulate(total, gradients, factors, numel, row, examples, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    summed = tl.load(total + at, mask=at < numel, other=0.0)
    place = gradients + at
    for example in range(examples):
        factor = tl.load(factors + example)
        # Of a factor of zero nothing is read, so that NaN adds nothing.
        read = tl.where(factor > 0, numel, 0)
        summed += factor * tl.load(place, mask=at < read, other=0.0).to(tl.float32)
        place += row
    tl.store(total + at, summed, mask=at < numel)


def accumulate(total: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """As `gram.accumulate`: one read of the gradients, one read and write of the total, in a fixed order."""
    gradients = gradients if gradients.stride(1) == 1 else gradients.contiguous()
    size, numel = gradients.shape
    _accumulate[(triton.cdiv(numel, WIDE),)](
        total, gradients, factors.float(), numel, gradients.stride(0), size, WIDE=WIDE
    )
