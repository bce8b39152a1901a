"""What is learned. A Task gives a model and per-example losses; it knows no Ray, no DeepSpeed and no privacy."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from rayproj.errors import UserError

Batch = dict[str, Tensor]
"""Fields of a dataset, stacked: [B, ...]. "row" is int64 [B, 3], (global sample index, step, view): the key of all
per-sample randomness (`rayproj.keyed`)."""


class Task(Protocol):
    """The same Task trains plainly or privately: the Step decides what becomes of its losses.

    Attributes:
        starts_trained: whether `build` gives trained weights, which a training of no steps keeps as they are.
    """

    starts_trained: bool

    def build(self) -> nn.Module:
        """The trainable model on CPU, a function of the task's seed alone."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-example losses, fp32 [B]. Reaches the model through its forward only; row b depends on example b only."""
        ...

    def preview(self, model: nn.Module) -> np.ndarray | None:
        """Images that show what the model has learned, uint8 [N, C, H, W], or None."""
        ...


@runtime_checkable
class Validated(Protocol):
    """A Task that can be measured on held-out examples too."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Measures on held-out examples, by names that begin with "val_"; nothing where there are none."""
        ...


def train_only(model: nn.Module, pattern: str, option: str, kept: Collection[str] = ()) -> None:
    """Freeze the parameters in whose names a regular expression is not found, and those that are to be kept.

    Raises:
        UserError: that leaves none to be trained; it names the option.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(pattern, name)) and name not in kept)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = ", ".join(sorted({n.rsplit(".", 2)[0] for n, _ in model.named_parameters()})[:8])
        raise UserError(
            f"{option}='{pattern}' is found in no parameter's name, so nothing would be trained; there are {names}, ..."
        )


def pattern_problems(pattern: str, option: str) -> list[str]:
    """What is wrong with a regular expression of a config."""
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{option}='{pattern}' is no regular expression ({error})."]
    return []
