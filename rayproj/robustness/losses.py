"""What attacks ascend: losses [B] of logits [B, K], true labels [B] and, if targeted, target labels [B]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, label, target) to losses; untargeted ones ignore the target."""


def _of(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label[:, None])[:, 0]


def _best_other(logits: Tensor, label: Tensor) -> Tensor:
    return logits.scatter(1, label[:, None], -torch.inf).amax(1)


def cross_entropy(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


def margin(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """max_{i≠y} z_i - z_y (Carlini and Wagner 2017): positive where the example is misclassified."""
    return _best_other(logits, label) - _of(logits, label)


def target_margin(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y."""
    return _of(logits, target) - _of(logits, label)


def target_alone(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """z_t."""
    return _of(logits, target)


def dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6), which neither a shift nor a scale of the logits changes;
    needs three classes."""
    top = logits.topk(3, dim=1).values
    return margin(logits, label, target) / (top[:, 0] - top[:, 2] + 1e-12)


def target_dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Of a target (ibid., eq. 7); needs four classes."""
    top = logits.topk(4, dim=1).values
    return target_margin(logits, label, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def untargeted(classes: int) -> Loss:
    """DLR, or with fewer than three classes the margin."""
    return dlr if classes >= 3 else margin


def targeted(classes: int) -> Loss:
    """DLR of a target, or with fewer than four classes the margin."""
    return target_dlr if classes >= 4 else target_margin
