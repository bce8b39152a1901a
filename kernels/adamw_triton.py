"""AdamW and averages of the weights in one pass over a shard; the reference is `adamw`.

Needs a GPU, or TRITON_INTERPRET=1, with which Triton runs the kernel's own code on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayproj.kernels import adamw  # type: ignore[attr-defined]

PIECE = 1024  # elements of a program


@triton.jit
def updated(  # type: ignore[no-untyped-def]
    gradient, master, exp_avg, exp_avg_sq, at, inside, step_size, root, eps, decay, new_first, old_second, new_second
):
    """The weights at these places after an update, which with the moments are stored."""
    first = tl.load(exp_avg + at, mask=inside, other=0.0)
    first += new_first * (gradient - first)
    second = old_second * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + new_second * gradient * gradient
    weight = decay * tl.load(master + at, mask=inside, other=0.0)
    divisor = tl.div_rn(tl.sqrt_rn(second), root + tl.zeros_like(second)) + eps
    weight -= tl.div_rn(step_size * first, divisor)
    tl.store(exp_avg + at, first, mask=inside)
    tl.store(exp_avg_sq + at, second, mask=inside)
    tl.store(master + at, weight, mask=inside)
    return weight


def scales(
    updates: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, float, float, float, float, float, float]:
    """What `updated` is told: from step_size to new_second."""
    step_size, root = adamw.corrections(updates, lr, betas)
    return step_size, root, eps, 1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1]


@triton.jit
def _with_averages(  # type: ignore[no-untyped-def]
    gradient, master, exp_avg, exp_avg_sq, average0, average1, average2, size, step_size, root, eps, decay,
    new_first, old_second, new_second, new0, new1, new2, AVERAGES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    inside = at < size
    g = tl.load(gradient + at, mask=inside, other=0.0)
    weight = updated(
        g, master, exp_avg, exp_avg_sq, at, inside, step_size, root, eps, decay, new_first, old_second, new_second
    )
    if AVERAGES > 0:
        value = tl.load(average0 + at, mask=inside, other=0.0)
        tl.store(average0 + at, value + new0 * (weight - value), mask=inside)
    if AVERAGES > 1:
        value = tl.load(average1 + at, mask=inside, other=0.0)
        tl.store(average1 + at, value + new1 * (weight - value), mask=inside)
    if AVERAGES > 2:
        value = tl.load(average2 + at, mask=inside, other=0.0)
        tl.store(average2 + at, value + new2 * (weight - value), mask=inside)


def update_with_averages(
    gradient: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: list[Tensor],
    decays: list[float],
    updates: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """As `adamw.update_with_averages`, for at most three averages: 28 bytes an element and 8 for each average, where AdamW
    by itself moves 28 and an average 12 more."""
    assert len(averages) <= 3
    flat = [gradient, master, exp_avg, exp_avg_sq, *averages]
    assert all(t.dtype is torch.float32 and t.is_contiguous() and t.shape == gradient.shape for t in flat)
    new = [1 - decay for decay in decays] + [0.0] * (3 - len(decays))
    flat += [master] * (3 - len(averages))  # in the place of those there are not; never touched
    grid, told = (triton.cdiv(len(gradient), PIECE),), scales(updates, lr, betas, eps, weight_decay)
    _with_averages[grid](*flat, len(gradient), *told, *new, AVERAGES=len(averages), PIECE=PIECE)
