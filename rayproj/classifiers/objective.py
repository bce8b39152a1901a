"""What a classifier learns by: the loss of each example, and what is done for groups that are rare."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj.data.cells import Cells

GROUP_WEIGHTS = "group_log_weights"  # the buffer of a model in which GroupDRO keeps its weights
FIXED = 2.0**20  # of them, which are integers, so that no cast of the model touches them


class Loss(Enum):
    cross_entropy = "cross_entropy"
    focal = "focal"  # (1 - p)^γ times it (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4)
    group_dro = "group_dro"  # of the groups, those that are worst the most (Sagawa et al. 2020, algorithm 1)


class Balance(Enum):
    none = "none"
    oversample = "oversample"  # every cell is drawn as often as any other
    reweight = "reweight"  # the loss of an example is divided by how many its cell has


@dataclass
class ObjectiveConfig:
    """The loss, and the groups that it looks at."""

    loss: Loss = Loss.cross_entropy
    gamma: float = 2.0  # of the focal loss
    # Attributes of the images, which with the label make the cells of group_dro and of balance.
    groups: list[str] = field(default_factory=list)
    balance: Balance = Balance.none
    dro_step: float = 0.01  # η of GroupDRO
    dro_adjustment: float = 0.0  # C: C / √n of a group of n is added to its loss (Sagawa et al. 2020, eq. 5)
    label_smoothing: float = 0.0

    def problems(self) -> list[str]:
        found = [] if self.gamma >= 0 else [f"objective.gamma must not be negative, not {self.gamma:g}."]
        if not 0 <= self.label_smoothing < 1:
            found.append(f"objective.label_smoothing must lie in [0, 1), not {self.label_smoothing:g}.")
        if self.loss is Loss.group_dro and self.balance is Balance.reweight:
            found.append("objective.balance=reweight and loss=group_dro both weigh the cells; choose one.")
        return found if self.dro_step > 0 else [*found, f"objective.dro_step must be positive, not {self.dro_step:g}."]

    @property
    def needs_cells(self) -> bool:
        return self.loss is Loss.group_dro or self.balance is not Balance.none


class Objective:
    """Losses [B] of logits, with the cells of the training set where the config asks for them.

    Args:
        cells: of the training samples, in the order of their numbers in "row".
    """

    def __init__(self, config: ObjectiveConfig, cells: Cells | None = None) -> None:
        assert cells is not None or not config.needs_cells, "the config asks for cells"
        self.config, self.groups = config, 0
        if cells is not None:
            self.cell, self.groups = torch.from_numpy(cells.numbers), len(cells.names)
            self.weight = torch.from_numpy(cells.inverse())
            self.adjustment = torch.from_numpy(config.dro_adjustment / np.sqrt(cells.counts)).float()

    def prepare(self, model: nn.Module) -> None:
        """Give a model what the loss keeps in it."""
        if self.config.loss is Loss.group_dro:
            model.register_buffer(GROUP_WEIGHTS, torch.zeros(self.groups, dtype=torch.int32))

    def __call__(self, model: nn.Module, logits: Tensor, label: Tensor, row: Tensor) -> Tensor:
        config = self.config
        losses = F.cross_entropy(logits, label, reduction="none", label_smoothing=config.label_smoothing)
        if config.loss is Loss.focal:
            p = logits.softmax(1).gather(1, label[:, None])[:, 0]
            losses = (1 - p) ** config.gamma * losses
        if config.balance is Balance.reweight:
            losses = losses * self.weight[row[:, 0].cpu()].to(losses)
        if config.loss is Loss.group_dro:
            losses = self._worst_first(model, losses, self.cell[row[:, 0].cpu()].to(losses.device))
        return losses

    def _worst_first(self, model: nn.Module, losses: Tensor, cell: Tensor) -> Tensor:
        """Losses whose mean over the ranks is Σ q_g of the mean losses of the groups in the batch. Collective in training,
        in which q_g goes by exp(η loss)."""
        sums = torch.zeros(2, self.groups, dtype=torch.float64, device=losses.device)
        sums[0].index_add_(0, cell, losses.detach().double())
        sums[1].index_add_(0, cell, torch.ones_like(sums[0][cell]))
        training = bare(model).training
        several = training and dist.is_initialized() and dist.get_world_size() > 1
        if several:
            dist.all_reduce(sums)
        count = sums[1].clamp(min=1)
        kept = getattr(model, GROUP_WEIGHTS)
        log = kept.double() / FIXED
        if training:
            mean = sums[0] / count + (sums[1] > 0) * self.adjustment.to(count)
            log = log + self.config.dro_step * mean * (sums[1] > 0)
            kept.copy_(((log - torch.logsumexp(log, 0)).clamp(min=-8) * FIXED).round().int())
            log = kept.double() / FIXED
        examples = len(losses) * (dist.get_world_size() if several else 1)
        return losses * (log.softmax(0)[cell] * examples / count[cell]).to(losses)


def bare(model: nn.Module) -> nn.Module:
    """The model inside DeepSpeed's engine, which itself is always in training, or the model."""
    return getattr(model, "module", model)
