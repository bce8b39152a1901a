"""Obfuscations of a user's own, as configs name them."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rayproj.obfuscation import Assets, Obfuscation, between


@dataclass
class Darken(Obfuscation):
    """All values lowered."""

    by: Annotated[Tensor, between(40, 140, harder="more")]  # levels

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        return (images.float() - self.by[:, None, None, None]).clamp(0, 255).round().to(torch.uint8)


@dataclass
class Negative(Obfuscation):
    """As on film; there is nothing to be drawn."""

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        return 255 - images


@dataclass
class Halved(Obfuscation):
    """Of another shape, which is none."""

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        return images[..., ::2]


class Undecorated(Obfuscation):
    by: Annotated[Tensor, between(0, 1)]


@dataclass
class WithoutRange(Obfuscation):
    by: Tensor
