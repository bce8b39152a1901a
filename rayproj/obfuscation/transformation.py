"""Obfuscations that move pixels."""

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
    blocks,
    drawn,
    hue_turned,
    length,
    places,
    projected,
    projective,
    sampled,
    side,
    spread,
    taken,
    to_bytes,
)


@dataclass
class LineShift(Obfuscation):
    """Rows or columns in thin bands, moved in turn to the one and to the other side; what leaves comes in again."""

    group = "transformation"
    width: Annotated[Tensor, between(1 / 75, 1 / 25)]
    shift: Annotated[Tensor, between(0.08, 0.4, harder="more")]
    across: Annotated[Tensor, whole(0, 1)]  # bands of columns

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        back = bands(images, length(self.width, images), self.across).bool()[:, None]
        pairs = zip(images, length(self.shift, images).tolist(), (2 - self.across).tolist(), strict=True)
        moved = [(x.roll(-shift, axis), x.roll(shift, axis)) for x, shift, axis in pairs]
        forth_and_back = [torch.stack(found) for found in zip(*moved, strict=True)]
        return torch.where(back, forth_and_back[1], forth_and_back[0])


@dataclass
class PerspectiveTransform(Obfuscation):
    """The image seen from elsewhere: the centres of its quarters go to places near them."""

    group = "transformation"
    moved: Annotated[Tensor, between(-0.11, 0.11, 8, harder="outer")]  # x and y of each centre

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        height, width = images.shape[2:]
        x, y = ([0.25 * n - 0.5, 0.75 * n - 0.5] for n in (width, height))
        centres = [[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]]]
        centre = torch.tensor(centres, dtype=torch.float64, device=images.device).expand(len(images), -1, -1)
        moved = centre + self.moved.double().view(-1, 4, 2) * side(images)
        return to_bytes(sampled(images, *projected(projective(moved, centre), images)))


@dataclass
class RotateBlocks(Obfuscation):
    """Small blocks, each turned by a quarter, half or three quarters; what does not fill a block stays."""

    group = "transformation"
    size: Annotated[Tensor, between(1 / 56, 1 / 12, harder="more")]
    key: Annotated[Tensor, KEY]

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        height, width = images.shape[2:]
        size = length(self.size, images, least=2)
        by, bx = blocks(images, size)
        turns = 1 + (3 * drawn("RotateBlocks", self.key, (1, TABLE, TABLE))).to(torch.uint8)
        turn = spread(turns, by, bx)[:, 0]
        whole_y, whole_x = ((b + 1) * size[:, None] <= n for b, n in ((by, height), (bx, width)))
        turn = turn * (whole_y[:, :, None] & whole_x[:, None])
        y, x = places(images, size)
        last, v, u = (size - 1)[:, None, None], y % size[:, None, None], x % size[:, None, None]
        # A quarter turn, against the clock, takes to (v, u) of a block what was at (u, last - v).
        turned = [(v * width, u), (last - v, u * width), ((last - v) * width, last - u), (v, (last - u) * width)]
        place = turned[0][0] + turned[0][1]
        for number, (of_row, of_column) in enumerate(turned[1:], 1):
            place = torch.where(turn == number, of_row + of_column, place)
        return taken(images, (y - v) * width + (x - u) + place)


@dataclass
class RotateImage(Obfuscation):
    """Turned about the centre, against the clock, on black."""

    group = "transformation"
    angle: Annotated[Tensor, between(15, 345, harder="inner")]  # degrees

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        height, width = images.shape[2:]
        angle = self.angle.double() * (math.pi / 180)
        cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
        y, x = places(images, self.angle)
        v, u = y - (height - 1) / 2, x - (width - 1) / 2
        y, x = u * sin + v * cos + (height - 1) / 2, u * cos - v * sin + (width - 1) / 2
        return to_bytes(sampled(images, y.float(), x.float()))


@dataclass
class SwirlWarp(Obfuscation):
    """Turned about a point, the more the nearer to it: by strength * exp(-distance ln 2 * 5 / radius), as of
    skimage.transform.swirl."""

    group = "transformation"
    strength: Annotated[Tensor, between(3, 8, harder="more")]  # radians at the point
    clockwise: Annotated[Tensor, whole(0, 1)]
    radius: Annotated[Tensor, between(0.7, 1.2, harder="more")]  # at which a thousandth of it is left, nearly
    centre: Annotated[Tensor, between(0.4, 0.6, 2)]  # x and y, of the sides

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        height, width = images.shape[2:]
        y, x = places(images, self.strength)
        cy = self.centre[:, 1, None, None].double() * (height - 1)
        cx = self.centre[:, 0, None, None].double() * (width - 1)
        v, u = y - cy, x - cx
        decay = (math.log(2) * 5 / (self.radius.double() * side(images)))[:, None, None]
        strength = (self.strength * (1 - 2 * self.clockwise)).double()[:, None, None]
        angle = strength * torch.exp(-(u * u + v * v).sqrt() * decay)
        cos, sin = angle.cos(), angle.sin()
        return to_bytes(sampled(images, (cy + u * sin + v * cos).float(), (cx + u * cos - v * sin).float()))


@dataclass
class WavyColorWarp(Obfuscation):
    """Rows and columns moved by sines, those of each channel a little later, and all hues turned."""

    group = "transformation"
    height: Annotated[Tensor, between(0.02, 0.06, 2, harder="more")]  # of the waves along y and along x
    waves: Annotated[Tensor, between(2, 6, 2)]
    phase: Annotated[Tensor, between(0, 2 * math.pi, 2)]
    lag: Annotated[Tensor, between(0.3, 1.2)]  # of a channel behind the one before, radians
    hue: Annotated[Tensor, between(40, 320, harder="inner")]  # degrees

    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        batch, channels, height, width = images.shape
        y, x = places(images, self.lag)
        lag = self.lag.double()[:, None] * torch.arange(channels, device=images.device)  # [B, C]

        def wave(axis: int, place: Tensor, longest: int) -> Tensor:
            """[B, C, ...]: how far pixels at a place are moved along an axis."""
            angle = self.phase[:, axis, None, None, None].double() + lag[:, :, None, None]
            angle = angle + 2 * math.pi * self.waves[:, axis, None, None, None].double() * place / longest
            return self.height[:, axis, None, None, None].double() * side(images) * torch.sin(angle)

        from_y, from_x = y + wave(0, x, width).float(), x + wave(1, y, height).float()
        single = images.reshape(batch * channels, 1, height, width)
        waved = sampled(single, from_y.flatten(0, 1), from_x.flatten(0, 1), outside="border")
        return to_bytes(hue_turned(waved.view(batch, channels, height, width), self.hue))
