"""Fast gradient sign and projected gradient descent, for training and as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayproj.robustness.losses import Loss, cross_entropy
from rayproj.robustness.oracle import Attacked, Oracle
from rayproj.robustness.threats import Norm, Threat, size, wide


def fgsm(oracle: Oracle, x: Tensor, label: Tensor, threat: Threat, loss: Loss = cross_entropy) -> Attacked:
    """One step of the whole radius (Goodfellow et al. 2015)."""
    return pgd(oracle, x, label, None, threat, steps=1, step=1.0, loss=loss)


def pgd(
    oracle: Oracle,
    x: Tensor,
    label: Tensor,
    row: Tensor | None,
    threat: Threat,
    steps: int = 10,
    step: float = 0.25,
    loss: Loss = cross_entropy,
    seed: int = 0,
    go_on: bool = True,
) -> Attacked:
    """Steepest ascent of the loss with projections (Madry et al. 2018); the last point.

    Args:
        x: fp32 [B, C, H, W] in [0, 1].
        row: int64 [B, 3], the keys of random starts; None starts at the images.
        step: length of each in radii.
        go_on: with examples that are broken, as training wants them; else they leave the batch.
    """
    point = x if row is None else threat.start(x, row, seed)
    found, number = (
        Attacked(x.clone(), torch.zeros_like(label, dtype=torch.bool)),
        torch.arange(len(x), device=x.device),
    )
    for _ in range(steps):
        _, gradient, logits = oracle.ask(point, label[number], label[number], loss)
        if not go_on and (broken := logits.argmax(1) != label[number]).any():
            found.images[number[broken]], found.broken[number[broken]] = point[broken], True
            number, point, gradient = number[~broken], point[~broken], gradient[~broken]
        if not len(number):
            return found
        point = _next(threat, x[number], point, gradient, threat.eps * step)
    found.images[number], found.broken[number] = point, oracle.logits(point).argmax(1) != label[number]
    return found


def msd(
    oracle: Oracle, x: Tensor, label: Tensor, row: Tensor | None, threats: Sequence[Threat], steps: int = 10,
    step: float = 0.25, loss: Loss = cross_entropy, seed: int = 0,
) -> Attacked:  # fmt: skip
    """Multi steepest descent (Maini, Wong and Kolter 2020, algorithm 1): of one gradient a step in every threat, and each
    example takes that of the highest loss, so that one path goes through the union of the balls; arguments as of `pgd`.
    Random starts are in the first ball."""
    point, each = x if row is None else threats[0].start(x, row, seed), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        _, gradient, _ = oracle.ask(point, label, label, loss)
        moved = torch.stack([_next(threat, x, point, gradient, threat.eps * step) for threat in threats])
        reached = torch.stack([loss(oracle.logits(z), label, label) for z in moved])
        point = moved[reached.argmax(0), each]
    return Attacked(point, oracle.logits(point).argmax(1) != label)


def _next(threat: Threat, x: Tensor, point: Tensor, gradient: Tensor, step: float) -> Tensor:
    if threat.norm is Norm.l1:
        return threat.project(x, point + step * steepest(gradient, Norm.l1))
    return threat.ascend(x, point, point, gradient, x.new_full((len(x),), step))


def steepest(gradient: Tensor, norm: Norm, share: float | Tensor = 0.05) -> Tensor:
    """Unit steps of steepest ascent; for ℓ1 the signs of the largest `share` of the values (of each example, if a tensor
    [B]), because the single largest alone hardly moves."""
    if norm is Norm.linf:
        return gradient.sign()
    if norm is Norm.l2:
        return gradient / wide(size(gradient, Norm.l2), gradient).clamp(min=1e-12)
    flat = gradient.flatten(1).abs()
    count = torch.as_tensor(share, device=flat.device).expand(len(flat)) * flat.shape[1]
    rank = (count.long().clamp(1, flat.shape[1]) - 1)[:, None]
    threshold = flat.sort(1, descending=True).values.gather(1, rank)
    signs = torch.where(flat >= threshold, gradient.flatten(1).sign(), 0.0).view_as(gradient)
    return signs / wide(size(signs, Norm.l1), signs).clamp(min=1)
