"""Obfuscations that need something learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rayproj.obfuscation.assets import Assets, fitted
from rayproj.obfuscation.base import Obfuscation, between, whole
from rayproj.obfuscation.composition import ANY, framed, laid
from rayproj.obfuscation.pixels import grey, mixed, per_image, to_bytes
from rayproj.obfuscation.styles import StyleNetwork


@dataclass
class AdversarialPatches(Obfuscation):
    """Made a little smaller, amid a blurred enlargement of itself, with an adversarial patch in each corner."""

    group, needs = "learned", "patches"
    size: Annotated[Tensor, between(0.72, 0.84, harder="less")]
    patch: Annotated[Tensor, whole(0, ANY)]
    patch_size: Annotated[Tensor, between(0.19, 0.25, harder="more")]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        self.require(assets)
        assert assets.patches is not None
        patches = assets.patches
        if patches.shape[1] != images.shape[1]:
            patches = fitted(patches, (images.shape[1], *patches.shape[2:]))
        return to_bytes(laid(framed(images, self.size), patches[self.patch % len(patches)].float(), self.patch_size))


@dataclass
class StyleTransfer(Obfuscation):
    """Repainted in the style of a picture."""

    group, needs = "learned", "styles"
    style: Annotated[Tensor, whole(0, ANY)]
    strength: Annotated[Tensor, between(0.75, 1.0, harder="more")]  # weight against the image

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        network = _styles(self, assets)
        painted = _repainted(network, images, self.style % network.pictures)
        return to_bytes(mixed(images.float(), painted, per_image(self.strength)))


@dataclass
class Texturize(Obfuscation):
    """Nearly grey, and repainted as a texture."""

    group, needs = "learned", "styles"
    style: Annotated[Tensor, whole(0, ANY)]
    strength: Annotated[Tensor, between(0.75, 0.95, harder="more")]  # weight against the image
    colour: Annotated[Tensor, between(0.0, 0.25, harder="less")]  # that is left

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        network = _styles(self, assets)
        painted = _repainted(network, images, network.pictures + self.style % network.textures)
        x = mixed(images.float(), painted, per_image(self.strength))
        return to_bytes(mixed(grey(x), x, per_image(self.colour)))


def _styles(which: Obfuscation, assets: Assets) -> StyleNetwork:
    which.require(assets)
    assert assets.styles is not None
    return assets.styles


@torch.no_grad()
def _repainted(network: StyleNetwork, images: Tensor, style: Tensor) -> Tensor:
    """fp32 [B, C, H, W]; one by one on a CPU, whose convolutions round otherwise in batches of other sizes."""
    x = images.float().expand(-1, 3, -1, -1)
    parts = 1 if x.is_cuda else len(x)
    pairs = zip(x.tensor_split(parts), style.tensor_split(parts), strict=True)
    painted = torch.cat([network(part, numbers) for part, numbers in pairs])
    return painted if images.shape[1] == 3 else grey(painted)
