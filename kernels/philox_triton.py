"""Noise for a shard of the flat gradient in one pass over it, also together with the update by AdamW; the references are
`philox.flat_normal` and `philox.noisy_adamw`.

Needs a GPU, or TRITON_INTERPRET=1, with which Triton runs the kernel's own code on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rayproj.kernels.adamw_triton import scales, updated  # type: ignore[import-untyped]
from torch import Tensor

BLOCKS = 256  # counters of a program, of four elements each
TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def _normals(first, second):  # type: ignore[no-untyped-def]
    """Box-Muller in fp64, as `philox.normals_from_bits`: fp32 would lose the small radii, where the log nears zero."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * 2.0**-32))
    angle = (TWO_PI * 2.0**-32) * second.to(tl.float64)
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def _noisy(  # type: ignore[no-untyped-def]
    total, size, key, word2, word3, step, attempt, first_block, start, noisy, std, normaliser, BLOCKS: tl.constexpr
):
    """This program's positions in the shard, which of them are within it, and (total + std * noise) / normaliser there."""
    begin = first_block + tl.program_id(0).to(tl.int64) * BLOCKS
    block = begin + tl.arange(0, BLOCKS).to(tl.int64)
    low = block.to(tl.uint32)
    zero = tl.zeros_like(low)
    high = (block >> 32).to(tl.uint32) ^ word3.to(tl.uint32)
    n0, n1, n2, n3 = tl.philox(key, low, zero + step.to(tl.uint32), zero + (attempt ^ word2).to(tl.uint32), high)
    n0, n1 = _normals(n0, n1)
    n2, n3 = _normals(n2, n3)
    # 0, 1, 2, 3 of the first counter, then of the second: neighbours in memory for neighbouring threads.
    noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    position = 4 * begin - start + tl.arange(0, 4 * BLOCKS)
    inside = (position >= 0) & (position < size)
    summed = tl.load(total + position, mask=inside, other=0.0)
    noise = tl.where(position < noisy, noise, 0.0)
    return position, inside, tl.div_rn(summed + std * noise, normaliser + tl.zeros_like(noise))


# Nothing that a key, a step or a rank decides may become a constant of the code, or each would be compiled anew.
NOT_CONSTANT = ["key", "word2", "word3", "step", "attempt", "first_block", "start", "noisy"]


@triton.jit(do_not_specialize=NOT_CONSTANT)
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
    position, inside, value = _noisy(
        total, size, key, word2, word3, step, attempt, first_block, start, noisy, std, normaliser, BLOCKS
    )
    tl.store(out + position, value, mask=inside)


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
    out = torch.empty_like(total)
    grid, options = _launch(total, words, step, attempt, start, noisy, std, normaliser)
    _add_noise[grid](total, out, *options, BLOCKS=BLOCKS)
    return out


def _launch(
    total: Tensor, words: tuple[int, int, int, int], step: int, attempt: int, start: int, *options: float
) -> tuple[tuple[int], tuple[float, ...]]:
    """The programs, and what is said to them of the shard, the noise and the scales."""
    assert total.dtype is torch.float32 and total.is_contiguous() and total.ndim == 1
    first, last = start // 4, -(-(start + len(total)) // 4)
    key = words[0] | (words[1] << 32)
    key -= (key >> 63) << 64  # the same bits as a signed integer
    programs = triton.cdiv(last - first, BLOCKS)
    return (programs,), (len(total), key, words[2], words[3], step, attempt, first, start, *options)


@triton.jit(do_not_specialize=NOT_CONSTANT)
def _noisy_adamw(  # type: ignore[no-untyped-def]
    total,
    master,
    exp_avg,
    exp_avg_sq,
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
    step_size,
    root,
    eps,
    decay,
    new_first,
    old_second,
    new_second,
    BLOCKS: tl.constexpr,
):
    at, inside, gradient = _noisy(
        total, size, key, word2, word3, step, attempt, first_block, start, noisy, std, normaliser, BLOCKS
    )
    updated(
        gradient,
        master,
        exp_avg,
        exp_avg_sq,
        at,
        inside,
        step_size,
        root,
        eps,
        decay,
        new_first,
        old_second,
        new_second,
    )


def noisy_adamw(
    total: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    words: tuple[int, int, int, int],
    step: int,
    attempt: int,
    start: int,
    noisy: int,
    std: float,
    normaliser: float,
    updates: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """As `philox.noisy_adamw`, in one pass; for engines that own their optimizer. (Those of this project are DeepSpeed's,
    whose optimizer is handed the gradient that `add_noise` makes: the self-test looks at it there.)

    Moves 28 bytes an element, four reads and three writes of fp32, as AdamW does by itself. `add_noise` and then torch's
    AdamW move 36 if that is the fused one, and 88 if each of its eight operations is a pass.
    """
    states = master, exp_avg, exp_avg_sq
    assert all(s.dtype is torch.float32 and s.is_contiguous() and s.shape == total.shape for s in states)
    grid, options = _launch(total, words, step, attempt, start, noisy, std, normaliser)
    told = scales(updates, lr, betas, eps, weight_decay)
    _noisy_adamw[grid](total, *states, *options, *told, BLOCKS=BLOCKS)
