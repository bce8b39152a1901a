"""AdamW on a shard of a flat vector, and averages of its weights: the reference of `adamw_triton`."""

from __future__ import annotations

import math

from torch import Tensor


def update(
    gradient: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    updates: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update, in place (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; the weight decay is times the
    learning rate, as in torch).

    Args:
        gradient, master, exp_avg, exp_avg_sq: fp32 [n]: gradient, weights and moments.
        updates: how many the moments have seen, with this one: for the bias correction.
    """
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    size, root = corrections(updates, lr, betas)
    master.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(root).add_(eps), value=-size)


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
    """The same, and each average [n] becomes decay average + (1 - decay) weight."""
    update(gradient, master, exp_avg, exp_avg_sq, updates, lr, betas, eps, weight_decay)
    for average, decay in zip(averages, decays, strict=True):
        average.lerp_(master, 1 - decay)


def corrections(updates: int, lr: float, betas: tuple[float, float]) -> tuple[float, float]:
    """lr / (1 - β₁ᵗ) and √(1 - β₂ᵗ): what multiplies the first moment, and divides the root of the second."""
    return lr / (1 - betas[0] ** updates), math.sqrt(1 - betas[1] ** updates)
