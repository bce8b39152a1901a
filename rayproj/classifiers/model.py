"""Image classifiers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj.classifiers.ensembles import BatchEnsemble, Ensemble, MCDropout
from rayproj.classifiers.epinet import Epinet, EpistemicConfig, EpistemicNetwork, Kind
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
    epistemic: EpistemicConfig = field(default_factory=EpistemicConfig)  # a network that knows how sure it is

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

    def scaled(self, images: Tensor) -> Tensor:
        """What the first layer sees: in [-1, 1]."""
        return (images.float() / 127.5 - 1).to(next(self.parameters()).dtype)

    def pooled(self, images: Tensor) -> Tensor:
        """What the head sees, [B, channels of the last stage]."""
        return F.adaptive_avg_pool2d(self.features(self.scaled(images)), 1).flatten(1)

    def classify(self, pooled: Tensor) -> Tensor:
        return self.head(self.dropout(pooled))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.pooled(images)).float()


def network(config: ClassifierConfig, image_channels: int, num_classes: int) -> nn.Module:
    """The classifier that a config describes, with random weights of torch's generator: a ConvNet, or an epistemic network
    of it, that gives logits [B, num_classes] of uint8 images all the same."""

    def plain() -> ConvNet:
        return ConvNet(config, image_channels, num_classes)

    epistemic = config.epistemic
    if epistemic.kind is Kind.none:
        return plain()
    if epistemic.kind is Kind.epinet:
        return Epinet(epistemic, plain(), image_channels)
    if epistemic.kind is Kind.ensemble:
        members = [plain() for _ in range(epistemic.members)]
        return Ensemble(members, [plain() for _ in members if epistemic.prior], epistemic.prior)
    return (MCDropout if epistemic.kind is Kind.mc_dropout else BatchEnsemble)(epistemic, plain())


def start(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the weights of another run into a model, or, where that run is of a plain network, into the base of this one.

    Raises:
        UserError: they are of another network.
    """
    inside = isinstance(model, EpistemicNetwork) and hasattr(model, "base") and not any("base." in n for n in weights)
    load_flat(model.base if inside else model, weights)  # type: ignore[arg-type]


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
    """The averaged weights of a classifier run, in eval mode. An `EpistemicNetwork` where the run's config asks for one.

    Raises:
        UserError: the run has no commit, or its data are gone.
    """
    weights, text = weights_of(run_dir), Store(run_dir).read("config.yaml")
    header = Dataset.open(configuration.value(text, "data")).header
    config = configuration.section(ClassifierConfig, text, "classifier")
    model = network(config, header.fields["image"].shape[0], len(header.classes))
    load_flat(model, weights)
    model.to(torch.device(device)).eval().requires_grad_(False)
    return model
