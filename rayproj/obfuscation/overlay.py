"""Obfuscations that lay something over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rayproj.obfuscation.assets import Assets
from rayproj.obfuscation.base import Obfuscation, between, whole
from rayproj.obfuscation.composition import ANY
from rayproj.obfuscation.pixels import bands, grey, length, mixed, per_image, places, saturated, side, to_bytes


@dataclass
class ColorPatternOverlay(Obfuscation):
    """Without its colours, seen through a dense pattern of one bright colour."""

    group, held_out = "overlay", True
    count: Annotated[Tensor, between(16, 28)]  # of the pattern's cells along the shorter side
    pattern: Annotated[Tensor, whole(0, 2)]  # discs, checks, stripes
    hue: Annotated[Tensor, between(0, 1)]
    opacity: Annotated[Tensor, between(0.55, 0.8, harder="more")]  # of the pattern
    tint: Annotated[Tensor, between(0.2, 0.4, harder="more")]  # of its colour in the rest

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        y, x = places(images, self.count)
        cell = (side(images) / self.count.double())[:, None, None]
        v, u = (y + 0.5) / cell, (x + 0.5) / cell
        odd = v.floor() % 2 == 1
        across, down = ((p % 1 - 0.5) ** 2 for p in (u, v))
        # Every other row of discs is moved by half of one.
        discs = torch.where(odd, ((u + 0.5) % 1 - 0.5) ** 2, across) + down > 0.35**2
        checks = odd != (u.floor() % 2 == 1)
        stripes = (u % 2 + v % 2) % 2 < 1
        pattern = self.pattern[:, None, None]
        shown = torch.where(pattern == 0, discs, torch.where(pattern == 1, ~checks, stripes))
        weight = torch.where(shown, self.opacity[:, None, None], self.tint[:, None, None])[:, None]
        light = grey(images.float()).expand(-1, images.shape[1], -1, -1)
        return to_bytes(mixed(light, saturated(self.hue, images.shape[1]), weight))


@dataclass
class IconOverlay(Obfuscation):
    """A grid of one icon, half transparent."""

    group = "overlay"
    count: Annotated[Tensor, whole(6, 11)]  # along the shorter side
    icon: Annotated[Tensor, whole(0, ANY)]
    hue: Annotated[Tensor, between(0, 1)]
    opacity: Annotated[Tensor, between(0.5, 0.8, harder="more")]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        y, x = places(images, self.opacity)
        cell = (side(images) / self.count.double())[:, None]
        v, u = (((p.flatten() + 0.5) / cell) % 1 for p in (y, x))
        weight = assets.icons(self.icon, v, u) * per_image(self.opacity)
        return to_bytes(mixed(images.float(), saturated(self.hue, images.shape[1]), weight))


@dataclass
class ImageOverlay(Obfuscation):
    """Another picture, half transparent."""

    group = "overlay"
    opacity: Annotated[Tensor, between(0.4, 0.65, harder="more")]
    photo: Annotated[Tensor, whole(0, ANY)]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        other = assets.photos(self.photo, images.shape[1:])
        return to_bytes(mixed(images.float(), other.float(), per_image(self.opacity)))


@dataclass
class Interleave(Obfuscation):
    """Rows or columns in bands, every other of them those of another picture."""

    group = "overlay"
    width: Annotated[Tensor, between(1 / 32, 1 / 12, harder="less")]
    across: Annotated[Tensor, whole(0, 1)]  # bands of columns
    photo: Annotated[Tensor, whole(0, ANY)]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        other = bands(images, length(self.width, images), self.across).bool()
        return torch.where(other[:, None], assets.photos(self.photo, images.shape[1:]), images)


@dataclass
class TextOverlay(Obfuscation):
    """One text over and over, all over the image, aslant."""

    group = "overlay"
    size: Annotated[Tensor, between(1 / 9, 1 / 5)]  # height of a line
    text: Annotated[Tensor, whole(0, ANY)]
    angle: Annotated[Tensor, between(-35, 35)]  # degrees
    begin: Annotated[Tensor, between(0, 1, 2)]  # where the text begins, y and x
    hue: Annotated[Tensor, between(-0.06, 0.08)]  # reds, mostly
    opacity: Annotated[Tensor, between(0.75, 1.0, harder="more")]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        y, x = places(images, self.angle)
        angle = self.angle.double() * (math.pi / 180)
        cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
        line = length(self.size, images, least=4)[:, None, None]
        v = (y * cos - x * sin) / line + self.begin[:, 0, None, None]
        u = (y * sin + x * cos) / line + self.begin[:, 1, None, None]
        weight = assets.texts(self.text, v, u) * per_image(self.opacity)
        return to_bytes(mixed(images.float(), saturated(self.hue % 1, images.shape[1]), weight))
