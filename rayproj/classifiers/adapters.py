"""One network for clean and for adversarial images, a few of whose parameters there are once for each (Rebuffi, Croce and
Gowal 2023, "Revisiting adapters with adversarial training"): the class token, or norms and other layers for comparison.

An image goes through a mixture of the two. Mixtures other than (1, 0) and (0, 1) are the paper's adversarial model soups.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayproj.classifiers.networks import VisionTransformer

CLEAN, ADVERSARIAL = 0, 1
NORMS = (nn.LayerNorm, nn.GroupNorm)


class Branched(nn.Module):
    """A layer there are two of. Their outputs are mixed: being linear in the weights, they are those of mixed weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.mix: Tensor | None = None  # [B, 2], set for each forward

    def forward(self, x: Tensor) -> Tensor:
        assert self.mix is not None, "its Adapted says how to mix"
        first, second = (branch(x) for branch in self.branches)
        weight = self.mix.to(first.dtype).view(-1, 2, *[1] * (first.dim() - 1))
        return weight[:, 0] * first + weight[:, 1] * second


class Adapted(nn.Module):
    """A network with adapters.

    Args:
        network: of `networks`.
        kinds: what there are two of.

    Attributes:
        mix: weights of the two branches for images of which nothing else is said.
    """

    def __init__(self, network: nn.Module, kinds: Sequence[str]) -> None:
        super().__init__()
        self.network, self.kinds = network, tuple(kinds)
        self.mix = torch.tensor([1.0, 0.0])
        if isinstance(network, VisionTransformer):
            known = network.net.vit.embeddings
            if "token" in kinds:
                self.tokens = nn.Parameter(known.cls_token.detach().repeat(2, 1, 1))
                known.cls_token = None  # these are in its place
            if "positions" in kinds:
                self.positions = nn.Parameter(known.position_embeddings.detach().repeat(2, 1, 1))
                known.position_embeddings = None
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if self._has_two(network, child):
                    setattr(parent, name, Branched(child))

    def _has_two(self, network: nn.Module, layer: nn.Module) -> bool:
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        return (
            ("norms" in self.kinds and isinstance(layer, NORMS))
            or ("patches" in self.kinds and layer is first)
            or ("head" in self.kinds and layer is network.head)
        )

    def forward(self, images: Tensor, mix: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes], each image's through its own mixture [B, 2] where one is given."""
        mix = self.mix.to(images.device).expand(len(images), 2) if mix is None else mix
        for module in self.network.modules():
            if isinstance(module, Branched):
                module.mix = mix
        pairs = {"token": getattr(self, "tokens", None), "positions": getattr(self, "positions", None)}
        return self.network(images, **{n: _mixed(p, mix) for n, p in pairs.items() if p is not None})  # type: ignore[no-any-return]

    def own_parameters(self) -> int:
        """How many parameters a second branch adds."""
        branched = [m.branches[1] for m in self.network.modules() if isinstance(m, Branched)]
        more = sum(p.numel() for branch in branched for p in branch.parameters())
        return more + sum(getattr(self, n)[0].numel() for n in ("tokens", "positions") if hasattr(self, n))

    def merged(self, mix: Tensor) -> nn.Module:
        """The network alone, its adapters mixed once and for all: [2] weights."""
        network = copy.deepcopy(self.network)
        if isinstance(network, VisionTransformer):
            known = network.net.vit.embeddings
            if hasattr(self, "tokens"):
                known.cls_token = nn.Parameter(_mixed(self.tokens.detach(), mix[None]))
            if hasattr(self, "positions"):
                known.position_embeddings = nn.Parameter(_mixed(self.positions.detach(), mix[None]))
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Branched):
                    layer, other = child.branches
                    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
                        a.data = (mix[0] * a + mix[1] * b).detach()
                    setattr(parent, name, layer)
        return network


def _mixed(pair: Tensor, mix: Tensor) -> Tensor:
    """[2, ...] and [B, 2] to [B, ...]."""
    return torch.einsum("n...,bn->b...", pair, mix.to(pair))
