"""Noise for a shard of the flat gradient in one pass over it; the reference is `philox.flat_normal`.

Needs a GPU, or TRITON_INTERPRET=1, with which Triton runs the kernel's own code on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def _normals(first, second):  # type: ignore[no-untyped-def]
    """Box-Muller in fp64, as `philox.normals_from_bits`: fp32 would lose the small radii, where the log nears zero."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * 2.0**-32))
    angle = (TWO_PI * 2.0**-32) * second.to(tl.float64)
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


# Nothing that a key, a step or a rank decides may become a constant of the code, or each would be compiled anew.
@triton.jit(do_not_specialize=["key", "word2", "word3", "step", "attempt", "first_block", "start", "noisy"])
def _add_noise(  # type: ignore[no-untyped-def]
    total,
    out,
    size: tl.int64,
    key: tl.int64,
    word2: tl.int64,
    word3: tl.int64,
    step: tl.int64,
    attempt: tl.int64,
    first_block: tl.int64,
    start: tl.int64,
    noisy: tl.int64,
    std,
    normaliser,
    BLOCKS: tl.constexpr,
):
    block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    low = block.to(tl.uint32)
    zero = tl.zeros_like(low)
    high = (block >> 32).to(tl.uint32) ^ word3.to(tl.uint32)
    n0, n1, n2, n3 = tl.philox(key, low, zero + step.to(tl.uint32), zero + (attempt ^ word2).to(tl.uint32), high)
    n0, n1 = _normals(n0, n1)
    n2, n3 = _normals(n2, n3)
    # 0, 1, 2, 3 of the first counter, then of the second: neighbours in memory for neighbouring threads.
    noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    begin = 4 * (first_block + tl.program_id(0).to(tl.int64) * BLOCKS) - start
    position = begin + tl.arange(0, 4 * BLOCKS)
    inside = (position >= 0) & (position < size)
    summed = tl.load(total + position, mask=inside, other=0.0)
    noise = tl.where(position < noisy, noise, 0.0)
    tl.store(out + position, tl.div_rn(summed + std * noise, normaliser + tl.zeros_like(noise)), mask=inside)


def add_noise(
    total: Tensor,
    words: tuple[int, int, int, int],
    step: int,
    attempt: int,
    start: int,
    noisy: int,
    std: float,
    normaliser: float,
) -> Tensor:
    """(total + std * noise) / normaliser on a shard of a flat vector.

    Args:
        total: fp32 [n], contiguous: elements start to start + n of the vector.
        words, step, attempt: as of `philox.flat_normal`.
        start: where the shard begins.
        noisy: elements at the shard's beginning that have noise; what follows is padding.

    Returns:
        fp32 [n].
    """
    assert total.dtype is torch.float32 and total.is_contiguous() and total.ndim == 1
    out = torch.empty_like(total)
    first, last = start // 4, -(-(start + len(total)) // 4)
    key = words[0] | (words[1] << 32)
    key -= (key >> 63) << 64  # the same bits as a signed integer
    blocks = 256
    _add_noise[(triton.cdiv(last - first, blocks),)](
        total, out, len(total), key, words[2], words[3], step, attempt, first, start, noisy, std, normaliser, blocks
    )
    return out
