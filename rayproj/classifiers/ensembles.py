"""What an epinet is compared with, as epistemic networks: ensembles, dropout and batch ensembles, whose index says which
member, or which channels are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Channels are left out at random before every convolution and linear layer but the first, also in prediction (Gal and
    Ghahramani 2016), in place of the base's own dropout. The index is the mask, the channels of all layers after each other.
    """

    def __init__(self, config: EpistemicConfig, base: Any) -> None:
        super().__init__()
        self.config, self.base = config, _without_dropout(base)
        self.widths = [_inputs(layer) for layer in self._masked()]
        for layer in self._masked():
            layer.told = None
            layer.register_forward_pre_hook(_mask)

    def _masked(self) -> list[Any]:
        return [layer for layer in self.base.modules() if isinstance(layer, LAYERS)][1:]

    @property
    def default_indices(self) -> int:
        return self.config.predict

    def _masks(self, seed: int, stream: str, row: Tensor) -> Tensor:
        kept = keyed.uniform(seed, stream, row, (sum(self.widths),)) >= self.config.dropout
        return kept.float() / (1 - self.config.dropout)

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        return self._masks(seed, "dropout", row)[None]

    def indices(self, count: int, seed: int = 0) -> Tensor:
        return self._masks(seed, "prediction", keyed.places(count, next(self.parameters()).device))[:, None]

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, encoded: Tensor, z: Tensor) -> Tensor:
        x, z = _every(encoded, z)
        with _told(self._masked(), z.to(next(self.parameters()).dtype).split(self.widths, 1)):
            return self.base(x).unflatten(0, (-1, encoded.shape[0])).float()  # type: ignore[no-any-return]


class RankOne(nn.Module):
    """A layer whose weights are, for each member, those that all share times an outer product: its inputs and outputs are
    scaled by channel (Wen et al. 2020, eq. 1-4). The scales begin as random signs."""

    def __init__(self, layer: Any, members: int) -> None:
        super().__init__()
        self.layer = layer
        self.inputs = nn.Parameter(torch.randint(0, 2, (members, _inputs(layer))) * 2.0 - 1)
        self.outputs = nn.Parameter(torch.randint(0, 2, (members, len(layer.weight))) * 2.0 - 1)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(members, 1))
        self.layer.bias = None
        self.told: Tensor | None = None  # [B, members], set for each forward

    def forward(self, x: Tensor) -> Tensor:
        assert self.told is not None, "its BatchEnsemble says which member"
        found = self.layer(x * _by_channel(self.told @ self.inputs, x, self.layer))
        found = found * _by_channel(self.told @ self.outputs, found, self.layer)
        return found if self.bias is None else found + _by_channel(self.told @ self.bias, found, self.layer)


class BatchEnsemble(EpistemicNetwork):
    """Members that share their weights up to factors of rank one, in every convolution and linear layer. In training each
    example teaches one of them, drawn anew in every step. The index is one-hot."""

    def __init__(self, config: EpistemicConfig, base: Any) -> None:
        super().__init__()
        self.config, self.base = config, _without_dropout(base)
        for parent in list(self.base.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, LAYERS):
                    setattr(parent, name, RankOne(layer, config.members))

    def _layers(self) -> list[RankOne]:
        return [layer for layer in self.base.modules() if isinstance(layer, RankOne)]

    @property
    def default_indices(self) -> int:
        return self.config.members

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        member = (keyed.uniform(seed, "member", row) * self.config.members).long()
        return F.one_hot(member, self.config.members).float()[None]

    def indices(self, count: int, seed: int = 0) -> Tensor:
        return torch.eye(self.config.members, device=next(self.parameters()).device)[:count, None]

    def quantiles(self, seed: int, example: Tensor, z: Tensor) -> Tensor:
        return _quantiles(seed, example, z)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, encoded: Tensor, z: Tensor) -> Tensor:
        x, z = _every(encoded, z)
        layers = self._layers()
        with _told(layers, [z.to(layers[0].inputs.dtype)] * len(layers)):
            return self.base(x).unflatten(0, (-1, encoded.shape[0])).float()  # type: ignore[no-any-return]


LAYERS = (nn.Conv2d, nn.Linear)


def _inputs(layer: Any) -> int:
    return int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


def _without_dropout(base: nn.Module) -> nn.Module:
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


@contextmanager
def _told(layers: Sequence[Any], values: Sequence[Tensor]) -> Iterator[None]:
    """Each layer knows its value of every example, for one forward."""
    for layer, value in zip(layers, values, strict=True):
        layer.told = value
    try:
        yield
    finally:
        for layer in layers:
            layer.told = None


def _mask(layer: Any, given: tuple[Tensor]) -> tuple[Tensor] | None:
    """A hook: the layer's inputs, some channels left out; as they are for who asks the base by itself."""
    return None if layer.told is None else (given[0] * _by_channel(layer.told, given[0], layer),)


def _by_channel(scale: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    """[B, C] beside x, whose channels are its second axis in a convolution, else its last."""
    between = (None,) * (x.ndim - 2)
    return scale[(..., *between)] if isinstance(layer, nn.Conv2d) else scale[(slice(None), *between)]


def _every(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Every index with every image, in one batch of Z * B: what the images are, and [Z * B, D]. Not by `len`, which would
    fix the size of a batch in an export."""
    whole = x.expand(len(z), *x.shape).flatten(0, 1)
    return whole, z.expand(-1, x.shape[0], -1).flatten(0, 1)
