"""Image classifiers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj.classifiers.objective import GROUP_WEIGHTS
from rayproj.data.dataset import Dataset
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.engine import load_flat
from rayproj.errors import UserError
from rayproj.storage.store import Store


@dataclass
class ClassifierConfig:
    """A small convolutional network; every stage halves height and width."""

    channels: tuple[int, ...] = (32, 64, 128)
    norm_groups: int = 8
    dropout: float = 0.1

    def problems(self) -> list[str]:
        return [
            f"classifier.channels: {c} is not a multiple of classifier.norm_groups={self.norm_groups}."
            for c in self.channels
            if c % self.norm_groups
        ]


class ConvNet(nn.Module):
    """Logits [B, num_classes] of uint8 images [B, C, H, W]."""

    def __init__(self, config: ClassifierConfig, image_channels: int, num_classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = image_channels
        for channels in config.channels:
            stages += [
                nn.Conv2d(inputs, channels, 3, stride=2, padding=1),
                nn.GroupNorm(config.norm_groups, channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(config.norm_groups, channels),
                nn.SiLU(),
            ]
            inputs = channels
        self.features = nn.Sequential(*stages)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 127.5 - 1).to(self.head.weight.dtype)
        pooled = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.head(self.dropout(pooled)).float()


def weights_of(run_dir: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a classifier run's newest commit, flat fp32 by name, without what its objective kept there.

    Raises:
        UserError: the run has no commit.
    """
    store = Store(run_dir)
    if not store.exists("config.yaml"):
        raise UserError(f"There is no run at '{run_dir}'; give the run dir of jobs/train_classifier.py.")
    return {name: tensor for name, tensor in load_ema(store)[0].items() if name != GROUP_WEIGHTS}


def load(run_dir: str, device: str) -> nn.Module:
    """The averaged weights of a classifier run, in eval mode.

    Raises:
        UserError: the run has no commit, or its data are gone.
    """
    weights, text = weights_of(run_dir), Store(run_dir).read("config.yaml")
    header = Dataset.open(configuration.value(text, "data")).header
    model = ConvNet(
        configuration.section(ClassifierConfig, text, "classifier"),
        header.fields["image"].shape[0],
        len(header.classes),
    )
    load_flat(model, weights)
    model.to(torch.device(device)).eval().requires_grad_(False)
    return model
