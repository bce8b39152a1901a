"""Accuracy and confusion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [num_classes, num_classes]: rows are the true classes. Matrices of parts add up to that of the whole."""
    flat = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a proportion, 95 % by default (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    p, shrink = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / shrink
    return centre - half, centre + half


def accuracy(matrix: np.ndarray) -> dict[str, Any]:
    """Accuracy of a confusion matrix with its 95 % interval."""
    correct, total = int(np.trace(matrix)), int(matrix.sum())
    low, high = wilson_interval(correct, total)
    return {"value": correct / total, "low": low, "high": high, "n": total}
