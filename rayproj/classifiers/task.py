"""Classification as a Task."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed
from rayproj.classifiers.model import ClassifierConfig, ConvNet
from rayproj.data.dataset import Header
from rayproj.engine.task import Batch


class ClassificationTask:
    """Cross entropy with keyed random shifts and flips.

    Args:
        images: the header of a dataset with the fields "image" and "label".
        shift: largest shift of an image in pixels, along each axis.
        flip: whether to mirror left and right at random.
    """

    def __init__(self, config: ClassifierConfig, images: Header, seed: int, shift: int = 2, flip: bool = True) -> None:
        self.config, self.seed, self.shift, self.flip = config, seed, shift, flip
        self.image_channels = images.fields["image"].shape[0]
        self.num_classes = len(images.classes)

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return ConvNet(self.config, self.image_channels, self.num_classes)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images = shifted_and_flipped(batch["image"], batch["row"], self.seed, self.shift, self.flip)
        return F.cross_entropy(model(images), batch["label"], reduction="none")

    def preview(self, model: nn.Module) -> np.ndarray | None:
        return None


def shifted_and_flipped(images: Tensor, row: Tensor, seed: int, shift: int, flip: bool) -> Tensor:
    """Each image [B, C, H, W] moved by up to `shift` pixels (edges repeated) and perhaps mirrored, keyed by its row."""
    height, width = images.shape[2:]
    draw = keyed.uniform(seed, "augment", row, (3,))
    offset = (draw[:, :2] * (2 * shift + 1)).long() - shift
    y = (torch.arange(height, device=images.device) + offset[:, :1]).clamp(0, height - 1)
    x = (torch.arange(width, device=images.device) + offset[:, 1:2]).clamp(0, width - 1)
    if flip:
        x = torch.where(draw[:, 2:] < 0.5, x.flip(1), x)
    example = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around a slice put the channel axis last.
    return images[example, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
