"""Obfuscations that put the image into another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rayproj.obfuscation.assets import Assets
from rayproj.obfuscation.base import KEY, Obfuscation, between, whole
from rayproj.obfuscation.pixels import (
    blurred,
    inset,
    length,
    per_image,
    places,
    projected,
    projective,
    sampled,
    side,
    to_bytes,
)

ANY = 2**16 - 1  # numbers of things of which there are as many as the assets hold: modulo that


@dataclass
class BackgroundBlurComposition(Obfuscation):
    """Made small, on a strongly blurred copy of itself."""

    group = "composition"
    size: Annotated[Tensor, between(0.28, 0.42, harder="less")]
    place: Annotated[Tensor, between(0, 1, 2)]  # y and x, of the room that is left
    blur: Annotated[Tensor, between(0.04, 0.1, harder="more")]  # standard deviation

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        small, inside = inset(images, self.size, *self.place.T)
        return to_bytes(torch.where(inside, small, blurred(images, self.blur)))


@dataclass
class HighContrastBorder(Obfuscation):
    """Made small and of low contrast, within noise of all colours."""

    group = "composition"
    size: Annotated[Tensor, between(0.45, 0.6, harder="less")]
    contrast: Annotated[Tensor, between(0.12, 0.35, harder="less")]
    level: Annotated[Tensor, between(90, 165)]  # the grey that it comes near to
    key: Annotated[Tensor, KEY]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        middle = torch.full_like(self.size, 0.5)
        small, inside = inset(images, self.size, middle, middle)
        level = per_image(self.level)
        faint = to_bytes(level + per_image(self.contrast) * (small - level))
        return torch.where(inside, faint, assets.noise(self.key, images.shape[1:]))


@dataclass
class PhotoComposition(Obfuscation):
    """Made small, on another picture."""

    group = "composition"
    size: Annotated[Tensor, between(0.32, 0.45, harder="less")]
    place: Annotated[Tensor, between(0, 1, 2)]  # y and x, of the room that is left
    photo: Annotated[Tensor, whole(0, ANY)]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        small, inside = inset(images, self.size, *self.place.T)
        return torch.where(inside, to_bytes(small), assets.photos(self.photo, images.shape[1:]))


@dataclass
class PerspectiveComposition(Obfuscation):
    """Seen from aside, in another picture."""

    group, held_out = "composition", True
    # How far each corner is inside of that of the frame: x and y, of the sides.
    corners: Annotated[Tensor, between(0.05, 0.33, 8, harder="more")]
    photo: Annotated[Tensor, whole(0, ANY)]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        height, width = images.shape[2:]
        frame = [[0, 0], [1, 0], [1, 1], [0, 1]]
        corner = torch.tensor(frame, dtype=torch.float64, device=images.device)
        sides = torch.tensor([width - 1, height - 1], dtype=torch.float64, device=images.device)
        inner = corner + (1 - 2 * corner) * self.corners.double().view(-1, 4, 2)
        y, x = projected(projective(inner * sides, (corner * sides).expand_as(inner)), images)
        inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
        seen = to_bytes(sampled(images, y, x))
        return torch.where(inside[:, None], seen, assets.photos(self.photo, images.shape[1:]))


def framed(images: Tensor, size: Tensor) -> Tensor:
    """fp32 [B, C, H, W]: images made smaller, amid a blurred enlargement of themselves."""
    middle = torch.full_like(size, 0.5)
    small, inside = inset(images, size, middle, middle, halve=False)
    return torch.where(inside, small, blurred(images, torch.full_like(size, 4 / side(images)).clamp(max=0.1)))


def laid(framed_images: Tensor, patches: Tensor, size: Tensor) -> Tensor:
    """fp32 [B, C, H, W]: the patch of each image, [B, C, s, s] in [0, 255], in all four corners, at a share `size` [B] of
    the shorter side. Differentiable in the patches."""
    height, width = framed_images.shape[2:]
    y, x = places(framed_images, size)
    pixels = length(size, framed_images)[:, None, None]
    near = [torch.where(p < pixels, p, p - (n - pixels)) for p, n in ((y, height), (x, width))]
    inside = [(p >= 0) & (p < pixels) for p in near]
    scale = patches.shape[2] / pixels
    v, u = ((((p + 0.5) * scale - 0.5).clamp(0, patches.shape[2] - 1)).float() for p in near)
    shown = sampled(patches, v, u)
    return torch.where((inside[0] & inside[1])[:, None], shown, framed_images)
