"""The networks of classifiers: logits [B, num_classes] of images [B, C, H, W] with values from 0 to 255, uint8 or float.

None looks at more than one example at a time (group and layer norm, no batch norm), so that what an image is taken for does
not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj.classifiers.ensembles import BatchEnsemble, Ensemble, MCDropout
from rayproj.classifiers.epinet import Epinet, EpistemicConfig, EpistemicKind
from rayproj.config import below
from rayproj.errors import UserError


class Network(Enum):
    conv = "conv"  # small; every stage halves height and width
    wide_resnet = "wide_resnet"  # Zagoruyko and Komodakis 2016, with group norm
    vit = "vit"  # of transformers (Dosovitskiy et al. 2021)
    # With the ImageNet weights that come with a package, but for the head; trainable=^head leaves them as they are.
    efficientnet_lite0 = "efficientnet_lite0"


@dataclass
class ClassifierConfig:
    """A network, and what of it there is more than once."""

    network: Network = Network.conv
    channels: tuple[int, ...] = (32, 64, 128)  # conv: of each stage
    norm_groups: int = 8  # conv, wide_resnet
    dropout: float = 0.1
    depth: int = 28  # wide_resnet: 6 n + 4
    width: int = 10  # wide_resnet: times 16 channels
    layers: int = 4  # vit
    dim: int = 96  # vit
    heads: int = 3  # vit
    patch: int = 4  # vit: side
    weights: str = ""  # vit: folder of a ViTForImageClassification of transformers, in place of the five above
    # Of a model for clean and for adversarial images: what each has of its own (`adapters`), of token, positions, norms,
    # patches, head; token and positions are of a vit alone, and norms not of efficientnet_lite0, whose batch norms are not
    # trained. []: one model for both.
    adapters: list[str] = field(default_factory=list)
    # Of images as they are, and of attacked ones: one for all, or one for each of adversary.threats in their order.
    branches: list[str] = field(default_factory=lambda: ["clean", "adversarial"])
    epistemic: EpistemicConfig = field(default_factory=EpistemicConfig)  # a network that knows how sure it is

    def problems(self) -> list[str]:
        if small := below(1, "classifier", self, "norm_groups", "width", "layers", "dim", "heads", "patch"):
            return small
        found = [
            f"classifier.channels: {c} is not a multiple of classifier.norm_groups={self.norm_groups}."
            for c in self.channels
            if self.network is Network.conv and c % self.norm_groups
        ]
        if not 0 <= self.dropout < 1:
            found.append(f"classifier.dropout must lie in [0, 1), not {self.dropout:g}.")
        if self.network is Network.wide_resnet and ((self.depth - 4) % 6 or self.depth < 10):
            found.append(f"classifier.depth={self.depth} is not 6 n + 4, such as 16 or 28.")
        if self.network is Network.vit and self.dim % self.heads:
            found.append(f"classifier.dim={self.dim} does not divide over {self.heads} heads.")
        if self.weights and self.network is not Network.vit:
            found.append("classifier.weights are for classifier.network=vit.")
        known = {Network.vit: KINDS, Network.efficientnet_lite0: KINDS[3:]}.get(self.network, KINDS[2:])
        wrong = [kind for kind in self.adapters if kind not in known]
        if wrong:
            found.append(f"classifier.adapters: '{wrong[0]}' is none of {', '.join(known)} for {self.network.value}.")
        if len(self.branches) < 2 or len(set(self.branches)) < len(self.branches):
            found.append("classifier.branches are two at least, and each has another name.")
        kind = self.epistemic.kind
        if kind is not EpistemicKind.none and self.adapters:
            found.append("classifier.adapters do not go with classifier.epistemic.")
        return found


KINDS = ("token", "positions", "norms", "patches", "head")


class ConvNet(nn.Module):
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

    def pooled(self, images: Tensor) -> Tensor:
        """What the head sees, [B, features]."""
        x = self.features(centred(images, next(self.parameters()).dtype))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def classify(self, pooled: Tensor) -> Tensor:
        return self.head(self.dropout(pooled))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.pooled(images)).float()


def centred(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Values from 0 to 255 as values from -1 to 1."""
    return (images.float() / 127.5 - 1).to(dtype)


class _Block(nn.Module):
    """Norm, activation and convolution, twice, beside a shortcut (He et al. 2016, "Identity mappings")."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.silu(self.norm1(x))
        skipped = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        return skipped + self.conv2(self.dropout(F.silu(self.norm2(self.conv1(active)))))


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels."""

    def __init__(self, config: ClassifierConfig, image_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_channels, 16, 3, 1, 1, bias=False)
        blocks, inputs = list[nn.Module](), 16
        for stage in range(3):
            for number in range((config.depth - 4) // 6):
                outputs = 16 * 2**stage * config.width
                stride = 2 if stage and not number else 1
                blocks.append(_Block(inputs, outputs, stride, config.norm_groups, config.dropout))
                inputs = outputs
        self.blocks, self.norm = nn.Sequential(*blocks), nn.GroupNorm(config.norm_groups, inputs)
        self.head = nn.Linear(inputs, num_classes)

    def pooled(self, images: Tensor) -> Tensor:
        """What the head sees, [B, features]."""
        x = self.blocks(self.stem(centred(images, next(self.parameters()).dtype)))
        return F.silu(self.norm(x)).mean((2, 3))

    def classify(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.pooled(images)).float()


class EfficientNetLite0(nn.Module):
    """The one of `evaluation.features`, with a head of its own. Batch norms keep ImageNet's statistics, in training too."""

    def __init__(self, config: ClassifierConfig, classes: int) -> None:
        from rayproj.evaluation.features import EfficientNetLite0Features

        super().__init__()
        self.body = EfficientNetLite0Features().model.requires_grad_(True)
        self.body._fc = nn.Identity()
        self.dropout, self.head = nn.Dropout(config.dropout), nn.Linear(EfficientNetLite0Features.dimensions, classes)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        super().train(mode)
        self.body.eval()
        return self

    def pooled(self, images: Tensor) -> Tensor:
        """What the head sees, [B, 1280]; of images of about 224 pixels, grey ones as three equal channels."""
        x = (images.float().expand(-1, 3, -1, -1) - 127) / 128
        return self.body.extract_features(x.to(next(self.parameters()).dtype)).mean((2, 3))  # type: ignore[no-any-return]

    def classify(self, pooled: Tensor) -> Tensor:
        return self.head(self.dropout(pooled))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.pooled(images)).float()


class VisionTransformer(nn.Module):
    """A ViTForImageClassification of transformers that takes images as the others do.

    Attributes:
        net: the model of transformers.
        mean, std: of its inputs, which are in [0, 1] before.
    """

    def __init__(self, net: Any, mean: float | list[float] = 0.5, std: float | list[float] = 0.5) -> None:
        super().__init__()
        self.net = net
        self.mean, self.std = (torch.tensor(v).flatten()[:, None, None] for v in (mean, std))

    @property
    def head(self) -> nn.Linear:
        return self.net.classifier  # type: ignore[no-any-return]

    def forward(self, images: Tensor, token: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits; with other class tokens [B or 1, 1, dim] or position embeddings [B or 1, 1 + patches, dim] if given."""
        return self.classify(self.pooled(images, token, positions)).float()

    def classify(self, pooled: Tensor) -> Tensor:
        return self.net.classifier(pooled)  # type: ignore[no-any-return]

    def pooled(self, images: Tensor, token: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What the head sees, [B, dim]."""
        net, known = self.net.vit, self.net.vit.embeddings
        x = (images.float() / 255 - self.mean.to(images.device)) / self.std.to(images.device)
        patches = known.patch_embeddings(x.to(next(self.parameters()).dtype))
        token = known.cls_token if token is None else token
        positions = known.position_embeddings if positions is None else positions
        hidden = known.dropout(torch.cat([token.expand(x.shape[0], -1, -1), patches], 1) + positions)
        for layer in net.layers:
            hidden = layer(hidden, None)
        return net.layernorm(hidden)[:, 0]  # type: ignore[no-any-return]


def _vision_transformer(config: ClassifierConfig, channels: int, side: int, classes: int) -> VisionTransformer:
    from transformers import ViTConfig, ViTForImageClassification

    if not config.weights:
        if side % config.patch:
            raise UserError(f"classifier.patch={config.patch} does not divide the images' side of {side}.")
        known = ViTConfig(  # type: ignore[call-arg]
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.dim,
            image_size=side,
            patch_size=config.patch,
            num_channels=channels,
            num_labels=classes,
            hidden_dropout_prob=config.dropout,
        )
        return VisionTransformer(ViTForImageClassification(known))
    folder = Path(config.weights)
    if not (folder / "config.json").exists():
        raise UserError(f"There is no model of transformers at '{config.weights}'; give a folder with a config.json.")
    net = ViTForImageClassification.from_pretrained(folder, num_labels=classes, ignore_mismatched_sizes=True)
    if net.config.num_channels != channels or net.config.image_size != side:
        raise UserError(
            f"'{config.weights}' takes images of {net.config.num_channels} channels and a side of {net.config.image_size}, "
            f"and these have {channels} and {side}; import them with source.channels and source.image_size accordingly."
        )
    return VisionTransformer(net, *_normalisation(folder))


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation by the checkpoint's own preprocessing."""
    import json

    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return said.get("image_mean", [0.5]), said.get("image_std", [0.5])


def build(config: ClassifierConfig, channels: int, side: int, classes: int) -> nn.Module:
    """The network of a config with random weights of torch's generator: a plain one, one with adapters, or an epistemic
    network of plain ones.

    Raises:
        UserError: the weights are not there, or not for such images.
    """
    from rayproj.classifiers.adapters import Adapted

    def plain() -> ConvNet | WideResNet | VisionTransformer | EfficientNetLite0:
        if config.network is Network.vit:
            return _vision_transformer(config, channels, side, classes)
        if config.network is Network.efficientnet_lite0:
            if side < 32:
                raise UserError(
                    f"efficientnet_lite0 takes images of 32 pixels at least, better 224, and these have {side}."
                )
            return EfficientNetLite0(config, classes)
        return (ConvNet if config.network is Network.conv else WideResNet)(config, channels, classes)

    epistemic = config.epistemic
    if epistemic.kind is EpistemicKind.none:
        return Adapted(plain(), config.adapters, config.branches) if config.adapters else plain()
    if epistemic.kind is EpistemicKind.epinet:
        return Epinet(epistemic, plain(), (channels, side, side))
    if epistemic.kind is EpistemicKind.ensemble:
        members = [plain() for _ in range(epistemic.members)]
        return Ensemble(members, [plain() for _ in members if epistemic.prior], epistemic.prior)
    return (MCDropout if epistemic.kind is EpistemicKind.mc_dropout else BatchEnsemble)(epistemic, plain())
