"""Random changes of training images, keyed by their rows: an image is changed alike in a step wherever that is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rayproj import keyed
from rayproj.obfuscation import ObfuscateConfig, mixture

GREY = 128  # what comes in where an image was moved away


@dataclass
class AugmentConfig:
    """Which changes, one after the other in this order."""

    shift: int = 2  # largest shift in pixels, along each axis; edges are repeated
    flip: bool = True  # mirror left and right
    # Least and largest share of the area that is cut out and enlarged to the whole, such as [0.08, 1]; []: nothing is.
    crop: list[float] = field(default_factory=list)
    # Least and largest ratio of its width to its height.
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    colour: float = 0.0  # strength of changes of brightness, contrast, saturation and hue, up to 1
    rand_augment: int = 0  # operations on each image (Cubuk et al. 2020, "RandAugment"); 0: none
    magnitude: float = 9.0  # of them, up to 30
    obfuscate: ObfuscateConfig = field(default_factory=ObfuscateConfig)

    def problems(self) -> list[str]:
        found = [] if 0 <= self.colour <= 1 else [f"augment.colour must lie in [0, 1], not {self.colour:g}."]
        if not 0 <= self.magnitude <= 30:
            found.append(f"augment.magnitude must lie in [0, 30], not {self.magnitude:g}.")
        if self.crop and not (len(self.crop) == 2 and 0 < self.crop[0] <= self.crop[1] <= 1):
            found.append(f"augment.crop is [least, largest], shares of the area in (0, 1], not {self.crop}.")
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            found.append(f"augment.crop_ratio is [least, largest], both positive, not {self.crop_ratio}.")
        return found + [f"augment.{n} must not be negative." for n in ("shift", "rand_augment") if getattr(self, n) < 0]


def augmented(images: Tensor, row: Tensor, seed: int, config: AugmentConfig) -> Tensor:
    """uint8 [B, C, H, W] to the same, each changed at random."""
    if isinstance(images, FakeTensor):
        return images  # in a plan, which counts memory: there are no values to change
    images = shifted_and_flipped(images, row, seed, config.shift, config.flip)
    if config.crop:
        images = cropped(images, row, seed, config.crop, config.crop_ratio)
    if config.colour:
        images = coloured(images, row, seed, config.colour)
    if config.rand_augment:
        images = rand_augmented(images, row, seed, config.rand_augment, config.magnitude)
    return mixture(images, row, seed, config.obfuscate) if config.obfuscate.names else images


def shifted_and_flipped(images: Tensor, row: Tensor, seed: int, shift: int, flip: bool) -> Tensor:
    """Each image [B, C, H, W] moved by up to `shift` pixels (edges repeated) and perhaps mirrored, keyed by its row."""
    height, width = images.shape[2:]
    draw = keyed.uniform(seed, "augment", row, (3,))
    offset = (draw[:, :2] * (2 * shift + 1)).long() - shift
    y = (torch.arange(height, device=images.device) + offset[:, :1]).clamp(0, height - 1)
    x = (torch.arange(width, device=images.device) + offset[:, 1:2]).clamp(0, width - 1)
    if flip:
        x = torch.where(draw[:, 2:] < 0.5, x.flip(1), x)
    example = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around a slice put the channel axis last.
    return images[example, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


CROPS = 10  # that are drawn at most, for one that is inside the image


def crops(row: Tensor, seed: int, size: tuple[int, int], area: list[float], ratio: list[float]) -> Tensor:
    """Parts of images of this height and width, int64 [B, 4]: top, left, height and width of each.

    The share of the area is drawn evenly, and the logarithm of the ratio of width to height (Szegedy et al. 2015, "Going
    deeper with convolutions", section 6); of ten, the first that is inside the image is taken, at an even place, and where
    none is, the largest in the middle whose ratio is allowed: as by torchvision's RandomResizedCrop.
    """
    side_y, side_x = size
    share, shape, *place = keyed.uniform(seed, "crop", row, (CROPS, 4)).double().unbind(2)
    pixels = side_y * side_x * (area[0] + (area[1] - area[0]) * share)
    wide = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    height, width = (pixels / wide).sqrt().round().long(), (pixels * wide).sqrt().round().long()
    inside = (height > 0) & (height <= side_y) & (width > 0) & (width <= side_x)
    top, left = ((u * (whole - part + 1)).long() for u, whole, part in zip(place, size, (height, width), strict=True))
    tall, broad = min(side_y, max(1, round(side_x / ratio[0]))), min(side_x, max(1, round(side_y * ratio[1])))
    middle = torch.tensor([(side_y - tall) // 2, (side_x - broad) // 2, tall, broad], device=row.device)
    first = inside.int().argmax(1)[:, None, None].expand(-1, 1, 4)
    drawn = torch.stack([top, left, height, width], 2).gather(1, first)[:, 0]
    return torch.where(inside.any(1)[:, None], drawn, middle)


def cropped(images: Tensor, row: Tensor, seed: int, area: list[float], ratio: list[float]) -> Tensor:
    """Of each image [B, C, H, W] one of its `crops`, enlarged to the whole by bilinear interpolation."""
    size = images.shape[2:]
    box = crops(row, seed, (size[0], size[1]), area, ratio).float()
    ends = []
    for axis, side in enumerate(size):
        first, length = box[:, axis, None], box[:, 2 + axis, None]
        at = (torch.arange(side, device=images.device) + 0.5) * length / side - 0.5
        # Pixels of the whole image; beyond the middle of the outermost ones of the part these are repeated.
        at = first + at.clamp(min=0).minimum(length - 1)
        ends.append((2 * at + 1) / side - 1)
    y, x = ends
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], 3)
    found = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)


# Luma and two chromas of red, green and blue (NTSC, 1953), in which a turn of hue and a gain of saturation are linear.
YIQ = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]


def coloured(images: Tensor, row: Tensor, seed: int, strength: float) -> Tensor:
    """Brightness, contrast and saturation times 1 ± 0.8 strength, hue turned by up to ± 0.2 strength of a circle (the ranges
    of Chen et al. 2020, "SimCLR", appendix A); grey images keep their hue."""
    draw = 2 * keyed.uniform(seed, "colour", row, (4,)) - 1
    brightness, contrast, saturation = (1 + 0.8 * strength * draw[:, k, None, None, None] for k in range(3))
    x = images.float() * brightness
    x = (x - x.mean((1, 2, 3), keepdim=True)) * contrast + x.mean((1, 2, 3), keepdim=True)
    if images.shape[1] == 3:
        angle, gain = 2 * math.pi * 0.2 * strength * draw[:, 3], saturation[:, 0, 0, 0]
        turn = torch.zeros(len(images), 3, 3, dtype=torch.float64, device=images.device)
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = gain * angle.cos()
        turn[:, 1, 2], turn[:, 2, 1] = -gain * angle.sin(), gain * angle.sin()
        yiq = turn.new_tensor(YIQ)
        x = torch.einsum("bij,bjhw->bihw", (torch.linalg.inv(yiq) @ turn @ yiq).float(), x)
    return x.round().clamp(0, 255).to(torch.uint8)


Operation = Callable[[Image.Image, float, float], Image.Image]
"""(image, magnitude in [0, 1], sign) to another of the same size and kind."""


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    fill = GREY if image.mode == "L" else (GREY,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, m, sign: kind(image).enhance(1 + 0.9 * m * sign)


def _turned(image: Image.Image, m: float, sign: float) -> Image.Image:
    fill = GREY if image.mode == "L" else (GREY,) * 3
    return image.rotate(30 * m * sign, Image.Resampling.BILINEAR, fillcolor=fill)


# The operations of RandAugment with the ranges of AutoAugment (Cubuk et al. 2019, table 6).
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, m, sign: image,
    "auto contrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "rotate": _turned,
    "solarize": lambda image, m, sign: ImageOps.solarize(image, round(256 * (1 - m))),
    "posterize": lambda image, m, sign: ImageOps.posterize(image, 8 - round(4 * m)),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear x": lambda image, m, sign: _moved(image, (1, 0.3 * m * sign, 0, 0, 1, 0)),
    "shear y": lambda image, m, sign: _moved(image, (1, 0, 0, 0.3 * m * sign, 1, 0)),
    "translate x": lambda image, m, sign: _moved(image, (1, 0, 0.45 * m * sign * image.width, 0, 1, 0)),
    "translate y": lambda image, m, sign: _moved(image, (1, 0, 0, 0, 1, 0.45 * m * sign * image.height)),
}


def rand_augmented(images: Tensor, row: Tensor, seed: int, operations: int, magnitude: float) -> Tensor:
    """So many operations on each image, drawn evenly, all of the same magnitude, in a random direction."""
    draw = keyed.uniform(seed, "rand_augment", row, (operations, 2)).cpu().numpy()
    kinds, found = list(OPERATIONS.values()), []
    for image, drawn in zip(images.cpu().numpy(), draw, strict=True):
        picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2))
        for which, direction in drawn:
            picture = kinds[int(which * len(kinds))](picture, magnitude / 30, -1.0 if direction < 0.5 else 1.0)
        changed = np.asarray(picture)
        found.append(changed[None] if changed.ndim == 2 else np.moveaxis(changed, 2, 0))
    return torch.from_numpy(np.stack(found)).to(images.device)
