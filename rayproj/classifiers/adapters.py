"""One network for clean and for adversarial images, a few of whose parameters there are once for each (Rebuffi, Croce and
Gowal 2023, "Revisiting adapters with adversarial training"): the class token, or norms and other layers for comparison.

There may be more branches than the paper's two, such as one for each threat. An image goes through a mixture of them;
mixtures of more than one are the paper's adversarial model soups.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayproj.classifiers.networks import VisionTransformer

CLEAN, ADVERSARIAL = 0, 1
BRANCHES = ("clean", "adversarial")
NORMS = (nn.LayerNorm, nn.GroupNorm)


class Branched(nn.Module):
    """A layer there are several of. Their outputs are mixed: linear in the weights, they are those of mixed weights."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(1, count))])
        self.mix: Tensor | None = None  # [B, branches], set for each forward

    def forward(self, x: Tensor) -> Tensor:
        assert self.mix is not None, "its Adapted says how to mix"
        found = [branch(x) for branch in self.branches]
        weights = self.mix.to(found[0].dtype).view(-1, len(found), *[1] * (found[0].dim() - 1)).unbind(1)
        return sum(weight * one for weight, one in zip(weights, found, strict=True))  # type: ignore[return-value]


class Adapted(nn.Module):
    """A network with adapters.

    Args:
        network: of `networks`.
        kinds: what there are several of.
        names: of the branches.

    Attributes:
        mix: weights of the branches for images of which nothing else is said: the first one.
    """

    def __init__(self, network: nn.Module, kinds: Sequence[str], names: Sequence[str] = BRANCHES) -> None:
        super().__init__()
        self.network, self.kinds, self.names = network, tuple(kinds), tuple(names)
        self.mix = torch.eye(len(names))[0]
        if isinstance(network, VisionTransformer):
            known = network.net.vit.embeddings
            if "token" in kinds:
                self.tokens = nn.Parameter(known.cls_token.detach().repeat(len(names), 1, 1))
                known.cls_token = None  # these are in its place
            if "positions" in kinds:
                self.positions = nn.Parameter(known.position_embeddings.detach().repeat(len(names), 1, 1))
                known.position_embeddings = None
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if self._has_several(network, child):
                    setattr(parent, name, Branched(child, len(names)))

    def _has_several(self, network: nn.Module, layer: nn.Module) -> bool:
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        return (
            ("norms" in self.kinds and isinstance(layer, NORMS))
            or ("patches" in self.kinds and layer is first)
            or ("head" in self.kinds and layer is network.head)
        )

    def forward(self, images: Tensor, mix: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes], each image's through its own mixture [B, branches] where one is given."""
        mix = self.mix.to(images.device).expand(len(images), -1) if mix is None else mix
        for module in self.network.modules():
            if isinstance(module, Branched):
                module.mix = mix
        own = {"token": getattr(self, "tokens", None), "positions": getattr(self, "positions", None)}
        return self.network(images, **{n: _mixed(p, mix) for n, p in own.items() if p is not None})  # type: ignore[no-any-return]

    def own_parameters(self) -> int:
        """How many parameters all branches after the first add."""
        branched = [b for m in self.network.modules() if isinstance(m, Branched) for b in m.branches[1:]]
        more = sum(p.numel() for branch in branched for p in branch.parameters())
        return more + sum(getattr(self, n)[1:].numel() for n in ("tokens", "positions") if hasattr(self, n))

    def merged(self, mix: Tensor) -> nn.Module:
        """The network alone, its adapters mixed once and for all: [branches] weights."""
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
                    layer = child.branches[0]
                    for own in zip(*(branch.parameters() for branch in child.branches), strict=True):
                        own[0].data = sum(w * p for w, p in zip(mix, own, strict=True)).detach()  # type: ignore[union-attr]
                    setattr(parent, name, layer)
        return network


def _mixed(own: Tensor, mix: Tensor) -> Tensor:
    """[branches, ...] and [B, branches] to [B, ...]."""
    return torch.einsum("n...,bn->b...", own, mix.to(own))
