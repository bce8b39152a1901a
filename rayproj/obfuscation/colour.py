"""Obfuscations of colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rayproj.obfuscation.assets import Assets
from rayproj.obfuscation.base import KEY, Obfuscation, between, whole
from rayproj.obfuscation.pixels import (
    TABLE,
    bands,
    block_means,
    blocks,
    drawn,
    length,
    places,
    side,
    spread,
    to_bytes,
)


@dataclass
class ColorNoiseBlocks(Obfuscation):
    """In a grid of blocks, many have one of their channels moved by a random offset, cut at black and white."""

    group = "colour"
    size: Annotated[Tensor, between(1 / 24, 1 / 12)]  # side of a block
    share: Annotated[Tensor, between(0.5, 0.9, harder="more")]  # of the blocks that are changed
    strength: Annotated[Tensor, between(0.4, 1.0, harder="more")]  # largest offset, of the range of values
    key: Annotated[Tensor, KEY]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        channels = images.shape[1]
        u = drawn("ColorNoiseBlocks", self.key, (3, TABLE, TABLE))
        chosen = (u[:, 0] < self.share[:, None, None])[:, None] & (
            torch.arange(channels, device=u.device)[:, None, None] == (u[:, 1] * channels).long()[:, None]
        )
        offset = ((2 * u[:, 2] - 1) * self.strength[:, None, None] * 255).round().to(torch.int16)
        table = torch.where(chosen, offset[:, None], 0)
        changed = images.to(torch.int16) + spread(table, *blocks(images, length(self.size, images)))
        return changed.clamp(0, 255).to(torch.uint8)


@dataclass
class Halftoning(Obfuscation):
    """Each channel printed with one ink: a block becomes a shape that covers as much of it as the block is bright."""

    group = "colour"
    size: Annotated[Tensor, between(1 / 45, 1 / 18, harder="more")]  # side of a block
    method: Annotated[Tensor, whole(0, 3)]  # disc, square, diamond, line

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        size, channels = length(self.size, images, least=2), []
        for channel in range(images.shape[1]):
            # Each channel's blocks begin a little later, as the screens of printers are apart.
            begin = channel * int(side(images) / 96)
            bright = block_means(images[:, channel : channel + 1], size, begin)
            channels.append(torch.where(self._covered(images, size, begin)[:, None] < bright / 255, 255, 0))
        return torch.cat(channels, 1).to(torch.uint8)

    def _covered(self, images: Tensor, size: Tensor, begin: int) -> Tensor:
        """fp32 [B, H, W]: of the shape that just reaches a pixel, the share of the block that it covers."""
        longest = int(size.max())
        # A block at a time is enough: the shapes repeat.
        inside = (torch.arange(longest, device=size.device).double() + 0.5) / size[:, None].double() * 2 - 1
        v, u = inside.abs()[:, :, None], inside.abs()[:, None, :]
        radius = (u * u + v * v).sqrt()
        cut = radius.clamp(min=1)  # where the disc is cut by the block's edges
        disc = torch.where(
            radius <= 1, math.pi / 4 * radius**2,
            (cut**2 - 1).sqrt() + cut**2 * (math.pi / 4 - torch.arccos(1 / cut)),
        )  # fmt: skip
        diamond = torch.where(u + v <= 1, (u + v) ** 2 / 2, 1 - (2 - u - v) ** 2 / 2)
        shapes = [disc, torch.maximum(u, v) ** 2, diamond, v.expand_as(disc)]
        number = torch.arange(len(size), device=size.device)
        covered = torch.stack(shapes, 1)[number, self.method].float()
        y, x = places(images, size)
        y, x = ((p.flatten() + begin)[None] % size[:, None] for p in (y, x))
        return spread(covered[:, None], y, x)[:, 0]


@dataclass
class InvertLines(Obfuscation):
    """Rows or columns in bands, every other of them inverted."""

    group = "colour"
    width: Annotated[Tensor, between(1 / 28, 1 / 9, harder="less")]
    across: Annotated[Tensor, whole(0, 1)]  # bands of columns
    first: Annotated[Tensor, whole(0, 1)]  # whether the first band is inverted

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        inverted = bands(images, length(self.width, images), self.across) ^ self.first.to(torch.uint8)[:, None, None]
        return images ^ (255 * inverted)[:, None]


@dataclass
class LowContrastTriangles(Obfuscation):
    """The plane laid out with triangles of three kinds, in each of which contrast is lowered by another factor, about
    another grey."""

    group, held_out = "colour", True
    size: Annotated[Tensor, between(0.12, 0.35)]  # legs of a triangle
    shear: Annotated[Tensor, between(-0.6, 0.6)]
    contrast: Annotated[Tensor, between(0.05, 0.35, 3, harder="less")]  # of each kind
    level: Annotated[Tensor, between(60, 195, 3)]  # the grey that each kind comes near to

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        leg = (self.size.double() * side(images))[:, None, None]
        y, x = places(images, self.size)
        v, u = y / leg, x / leg + self.shear.double()[:, None, None] * y / leg
        column, row = u.floor(), v.floor()
        upper = u - column + (v - row) > 1
        # Of triangles that share a side, no two are of one kind.
        kind = (column + row + 2 * upper).long() % 3
        contrast, level = (p.gather(1, kind.flatten(1)).view_as(kind)[:, None] for p in (self.contrast, self.level))
        return to_bytes(level + contrast * (images.float() - level))
