"""What an epinet is compared with, as epistemic networks: ensembles, dropout and batch ensembles, whose index says which
member, or which channels are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed
from rayproj.classifiers.epinet import EpistemicConfig, EpistemicNetwork


def _quantiles(seed: int, example: Tensor, z: Tensor) -> Tensor:
    """Of one-hot indices: a uniform of each example and member."""
    return (keyed.uniform(seed, "bootstrap", keyed.of_samples(example), (z.shape[2],)) * z).sum(2)


class Ensemble(EpistemicNetwork):
    """Networks that began differently (Lakshminarayanan et al. 2017), each plus a fixed random one where there are priors
    (Osband et al. 2018, "Randomized Prior Functions"). The index is one-hot. A single network is an ensemble of one.

    In training every member learns from every example, unless there is a bootstrap.
    """

    def __init__(self, members: Sequence[nn.Module], priors: Sequence[nn.Module] = (), scale: float = 1.0) -> None:
        super().__init__()
        self.members, self.priors, self.scale = nn.ModuleList(members), nn.ModuleList(priors), scale
        self.priors.requires_grad_(False)

    def first(self, count: int) -> Ensemble:
        """The ensemble of the first members."""
        return Ensemble(list(self.members)[:count], list(self.priors)[:count], self.scale).train(self.training)

    def fixed(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.startswith("priors.")}

    @property
    def default_indices(self) -> int:
        return len(self.members)

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        return self.indices(len(self.members)).to(row.device)

    def indices(self, count: int, seed: int = 0) -> Tensor:
        return torch.eye(len(self.members), device=next(self.parameters()).device)[:count, None]

    def quantiles(self, seed: int, example: Tensor, z: Tensor) -> Tensor:
        return _quantiles(seed, example, z)

    def encode(self, images: Tensor) -> Tensor:
        """Logits of the members, [members, B, classes]."""
        found = torch.stack([member(images) for member in self.members])
        if len(self.priors):
            found = found + self.scale * torch.stack([prior(images) for prior in self.priors]).detach()
        return found

    def decode(self, encoded: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("zbk,kbc->zbc", z.expand(-1, encoded.shape[1], -1).to(encoded), encoded).float()


class MCDropout(EpistemicNetwork):
    """Channels are left out at random before every layer but the first, also in prediction (Gal and Ghahramani 2016). The
    index is the mask, the channels of all layers after each other."""

    def __init__(self, config: EpistemicConfig, base: Any) -> None:
        super().__init__()
        self.config = config
        self.base = base
        convolutions = [layer for layer in self.base.features if isinstance(layer, nn.Conv2d)]
        self.widths: list[int] = [*(layer.in_channels for layer in convolutions[1:]), self.base.head.in_features]

    @property
    def default_indices(self) -> int:
        return self.config.predict

    def _masks(self, seed: int, stream: str, row: Tensor) -> Tensor:
        kept = keyed.uniform(seed, stream, row, (sum(self.widths),)) >= self.config.dropout
        return kept.float() / (1 - self.config.dropout)

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        return self._masks(seed, "dropout", row)[None]

    def indices(self, count: int, seed: int = 0) -> Tensor:
        return self._masks(seed, "prediction", keyed.places(count, self.base.head.weight.device))[:, None]

    def encode(self, images: Tensor) -> Tensor:
        return self.base.scaled(images)

    def decode(self, encoded: Tensor, z: Tensor) -> Tensor:
        x, z = _every(encoded, z)
        masks = [mask[:, :, None, None] for mask in z.to(x.dtype).split(self.widths, 1)]
        x = self.base.features[0](x)
        for layer in self.base.features[1:]:
            x = layer(x * masks.pop(0) if isinstance(layer, nn.Conv2d) else x)
        pooled = (F.adaptive_avg_pool2d(x, 1) * masks.pop(0)).flatten(1)
        return self.base.head(pooled).unflatten(0, (-1, len(encoded))).float()


class RankOne(nn.Module):
    """A layer whose weights are, for each member, those that all share times an outer product: its inputs and outputs are
    scaled by channel (Wen et al. 2020, eq. 1-4). The scales begin as random signs."""

    def __init__(self, layer: Any, members: int) -> None:
        super().__init__()
        self.layer = layer
        outputs, inputs = self.layer.weight.shape[:2]
        self.inputs = nn.Parameter(torch.randint(0, 2, (members, inputs)) * 2.0 - 1)
        self.outputs = nn.Parameter(torch.randint(0, 2, (members, outputs)) * 2.0 - 1)
        self.bias = nn.Parameter(self.layer.bias.detach().repeat(members, 1))
        self.layer.bias = None

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        inputs, outputs, bias = (
            (z @ scale)[(...,) + (None,) * (x.ndim - 2)] for scale in (self.inputs, self.outputs, self.bias)
        )
        return self.layer(x * inputs) * outputs + bias


class BatchEnsemble(EpistemicNetwork):
    """Members that share their weights up to factors of rank one. In training each example teaches one of them, drawn anew
    in every step. The index is one-hot."""

    def __init__(self, config: EpistemicConfig, base: Any) -> None:
        super().__init__()
        self.config = config
        self.base = base
        for number, layer in enumerate(self.base.features):
            if isinstance(layer, nn.Conv2d):
                self.base.features[number] = RankOne(layer, config.members)
        self.base.head = RankOne(self.base.head, config.members)

    @property
    def default_indices(self) -> int:
        return self.config.members

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        member = (keyed.uniform(seed, "member", row) * self.config.members).long()
        return F.one_hot(member, self.config.members).float()[None]

    def indices(self, count: int, seed: int = 0) -> Tensor:
        return torch.eye(self.config.members, device=self.base.head.bias.device)[:count, None]

    def quantiles(self, seed: int, example: Tensor, z: Tensor) -> Tensor:
        return _quantiles(seed, example, z)

    def encode(self, images: Tensor) -> Tensor:
        return self.base.scaled(images)

    def decode(self, encoded: Tensor, z: Tensor) -> Tensor:
        x, z = _every(encoded, z)
        z = z.to(x.dtype)
        for layer in self.base.features:
            x = layer(x, z) if isinstance(layer, RankOne) else layer(x)
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.base.head(pooled, z).unflatten(0, (-1, len(encoded))).float()


def _every(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Every index with every image, in one batch of Z * B: what the images are, and [Z * B, D]."""
    whole = x.expand(len(z), *x.shape).flatten(0, 1)
    return whole, z.expand(-1, len(x), -1).flatten(0, 1)
