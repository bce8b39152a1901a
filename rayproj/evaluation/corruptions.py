"""The fifteen common corruptions at five severities, on batches of small images (Hendrycks and Dietterich 2019,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations").

The severities are those of CIFAR-10-C, made for images of 32 pixels and sensible from 28 to 64. What is random is keyed by
the image's row, so that an image is corrupted alike in any batch. Results do not compare with published ones to the last
digit: frost is drawn here and not cut from photographs, fog is a sum of octaves and not diamond-square, motion blur has
bilinear taps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rayproj import keyed
from rayproj.data.encodings import of_picture


class Draw:
    """Keyed random numbers for the images of a batch.

    Args:
        row: int64 [B, 3].
        seed: of all corruptions.
        stream: the corruption's name.
    """

    def __init__(self, row: Tensor, seed: int, stream: str) -> None:
        self.row, self.seed, self.stream = row, seed, stream

    def uniform(self, what: str, *shape: int) -> Tensor:
        """fp32 [B, *shape] in [0, 1)."""
        return keyed.uniform(self.seed, f"{self.stream}/{what}", self.row, shape)

    def normal(self, what: str, *shape: int) -> Tensor:
        return keyed.normal(self.seed, f"{self.stream}/{what}", self.row, shape)


Corruption = Callable[[Tensor, Draw, Any], Tensor]
"""fp32 images [B, C, H, W] in [0, 1], draws and a severity's parameters to the same; what leaves [0, 1] is clamped."""


def gaussian_noise(x: Tensor, draw: Draw, std: float) -> Tensor:
    return x + std * draw.normal("noise", *x.shape[1:])


def shot_noise(x: Tensor, draw: Draw, photons: float) -> Tensor:
    """Of a pixel of value x, Poisson(photons · x) / photons."""
    levels = (x * 255).round().long()
    # By inversion: the quantile functions of the 256 rates one after the other are one sorted table.
    counts = np.arange(int(photons + 12 * math.sqrt(photons)) + 2)
    table = scipy.stats.poisson.cdf(counts, photons * np.arange(256)[:, None] / 255)
    lookup = np.arange(256)[:, None] + np.minimum(table, 1 - 1e-12)
    u = draw.uniform("photons", *x.shape[1:]).double()
    place = np.searchsorted(lookup.ravel(), (levels + u).numpy())
    return torch.from_numpy(place - levels.numpy() * table.shape[1]).float() / photons


def impulse_noise(x: Tensor, draw: Draw, share: float) -> Tensor:
    """Black or white, evenly, at a share of the values."""
    u = draw.uniform("impulse", *x.shape[1:])
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def defocus_blur(x: Tensor, draw: Draw, radius_and_alias: tuple[float, float]) -> Tensor:
    """A disk of that radius, softened by a Gaussian on 3 x 3 pixels."""
    radius, alias = radius_and_alias
    place = torch.arange(-8, 9).float()
    disk = ((place[:, None] ** 2 + place**2) <= radius**2).float()
    soft = torch.exp(-(torch.arange(-1, 2).float() ** 2) / (2 * alias**2))
    kernel = F.conv2d((disk / disk.sum())[None, None], torch.outer(soft, soft)[None, None] / soft.sum() ** 2, padding=1)
    return filtered(x, kernel[0, 0, 5:-5, 5:-5])  # 7 x 7 hold all of a radius of 1.5


def glass_blur(x: Tensor, draw: Draw, parameters: tuple[float, int, int]) -> Tensor:
    """Pixels change places with near ones, one after the other, between two blurs."""
    sigma, reach, rounds = parameters
    x = (blurred(x, sigma) * 255).floor() / 255
    height, width = x.shape[2:]
    drawn = draw.uniform("swaps", rounds, height, width, 2)
    moves = (drawn * 2 * reach).long() - reach  # to reach - 1, as it was published
    batch = torch.arange(len(x))
    for number in range(rounds):
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                i, j = h + moves[:, number, h, w, 0], w + moves[:, number, h, w, 1]
                there = x[batch, :, i, j]
                x[batch, :, i, j] = x[:, :, h, w]
                x[:, :, h, w] = there
    return blurred(x, sigma)


def motion_blur(x: Tensor, draw: Draw, radius_and_sigma: tuple[int, float]) -> Tensor:
    angle = torch.deg2rad(90 * draw.uniform("angle") - 45)
    return trailed(x, *radius_and_sigma, angle)


def zoom_blur(x: Tensor, draw: Draw, largest: float) -> Tensor:
    """The mean of the image and of its middle enlarged by 1, 1.01, ... times."""
    count = round((largest - 1) / 0.01)
    factors = [1 + 0.01 * k for k in range(count)]
    return (x + torch.stack([zoomed(x, factor) for factor in factors]).sum(0)) / (count + 1)


def snow(x: Tensor, draw: Draw, parameters: tuple[float, ...]) -> Tensor:
    """Flakes that fall, on a paler image; twice, the second time upside down."""
    mean, std, zoom, threshold, radius, sigma, kept = parameters
    flakes = zoomed(mean + std * draw.normal("flakes", 1, *x.shape[2:]), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = trailed(flakes, int(radius), sigma, torch.deg2rad(90 * draw.uniform("angle") - 135))
    grey = luminance(x)
    return kept * x + (1 - kept) * torch.maximum(x, 1.5 * grey + 0.5) + flakes + flakes.flip(2, 3)


def frost(x: Tensor, draw: Draw, image_and_ice: tuple[float, float]) -> Tensor:
    """The image under crystals: ridges of a plasma, bluish where there are colours."""
    image, ice = image_and_ice
    ridges = 1 - (2 * plasma(draw, 1.6, *x.shape[2:]) - 1).abs()
    texture = (0.35 + 0.65 * ridges**2)[:, None]
    tint = torch.tensor([0.85, 0.95, 1.0] if x.shape[1] == 3 else [1.0]).view(1, -1, 1, 1)
    return image * x + ice * texture * tint


def fog(x: Tensor, draw: Draw, amount_and_decay: tuple[float, float]) -> Tensor:
    amount, decay = amount_and_decay
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(draw, decay, *x.shape[2:])[:, None]) * brightest / (brightest + amount)


def brightness(x: Tensor, draw: Draw, added: float) -> Tensor:
    """To the value of HSV; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-8), brighter)


def contrast(x: Tensor, draw: Draw, kept: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return kept * (x - mean) + mean


def elastic_transform(x: Tensor, draw: Draw, parameters: tuple[float, float, float]) -> Tensor:
    """A random affine map, and displacements that a Gaussian has smoothed (Simard et al. 2003); in parts of the side."""
    side = float(x.shape[3])
    alpha, sigma, affine = (p * side for p in parameters)
    height, width = x.shape[2:]
    # Three corners of a square about the middle, and where they go.
    centre, third = torch.tensor([width, height]) / 2, min(height, width) // 3
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * third + centre
    moved = corners + (2 * draw.uniform("corners", 3, 2) - 1) * affine
    ones = torch.ones(len(x), 3, 1)
    back = torch.linalg.solve(torch.cat([moved, ones], 2), corners.expand(len(x), 3, 2))
    grid = pixels(height, width)
    source = torch.cat([grid, torch.ones(height, width, 1)], 2).flatten(0, 1) @ back
    x = sampled(x, source.unflatten(1, (height, width)))
    if not alpha:
        return x
    noise = 2 * draw.uniform("displacement", 2, height, width) - 1
    return sampled(x, grid + alpha * blurred(noise, sigma, truncate=3).permute(0, 2, 3, 1))


def pixelate(x: Tensor, draw: Draw, share: float) -> Tensor:
    def change(picture: Image.Image) -> Image.Image:
        size = (int(picture.width * share), int(picture.height * share))
        return picture.resize(size, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)

    return by_pillow(x, change)


def jpeg_compression(x: Tensor, draw: Draw, quality: int) -> Tensor:
    def change(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=quality)
        return Image.open(buffer)

    return by_pillow(x, change)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}  # fmt: skip


def corrupted(images: Tensor, row: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """uint8 [B, C, H, W], C 1 or 3, to the same.

    Args:
        row: int64 [B, 3]: the keys of the images.
        name: one of CORRUPTIONS.
        severity: from 1 to 5.
    """
    change, parameters = CORRUPTIONS[name]
    x = change(images.float() / 255, Draw(row, seed, f"{name}/{severity}"), parameters[severity - 1])
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


# What they are made of.


def luminance(x: Tensor) -> Tensor:
    """[B, 1, H, W] by ITU-R BT.601."""
    if x.shape[1] == 1:
        return x
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel with a kernel of odd sides; the image goes on as its mirror."""
    above, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(x, (left, left, above, above), "reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None])[:, 0].unflatten(0, x.shape[:2])


def blurred(x: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """By a Gaussian; the edge pixels go on. As scipy.ndimage.gaussian_filter with mode="nearest"."""
    reach = int(truncate * sigma + 0.5)
    if not reach:
        return x
    weights = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    weights, flat = (weights / weights.sum()).view(1, 1, 1, -1), x.flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), "replicate"), weights)
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), "replicate"), weights.transpose(2, 3))
    return flat[:, 0].unflatten(0, x.shape[:2])


def sampled(x: Tensor, source: Tensor) -> Tensor:
    """Each pixel from a place [B, H, W, (x, y)], in pixels, bilinearly; beyond its edges the image goes on as its mirror."""
    size = torch.tensor([x.shape[3], x.shape[2]])
    grid = 2 * source / (size - 1) - 1
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="reflection", align_corners=True)


def pixels(height: int, width: int) -> Tensor:
    """Their places, [H, W, (x, y)]."""
    return torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).float()


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of the image, enlarged to its size, bilinearly."""
    middle = torch.tensor([x.shape[3] - 1, x.shape[2] - 1]) / 2
    return sampled(x, ((pixels(*x.shape[2:]) - middle) / factor + middle)[None])


def trailed(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Each image [B, C, H, W] smeared to one side, at its angle [B] in radians, by half of a Gaussian over 2 radius + 1
    pixels."""
    taps = torch.arange(2 * radius + 1).float()
    weights = torch.exp(-(taps**2) / (2 * sigma**2))
    direction = torch.stack([angle.cos(), angle.sin()], 1)[:, None, None]
    grid = pixels(*x.shape[2:])
    moved = [
        w * sampled(x, grid + k * direction) for k, w in zip(taps, weights / weights.sum(), strict=True) if w > 1e-4
    ]
    return torch.stack(moved).sum(0)


def plasma(draw: Draw, decay: float, height: int, width: int) -> Tensor:
    """Clouds [B, H, W] in [0, 1], each image from 0 to 1: octaves of smoothed noise, each finer one `decay` times weaker."""
    side = max(height, width)
    total = torch.zeros(len(draw.row), 1, height, width)
    for octave in range(1, math.ceil(math.log2(side)) + 1):
        noise = draw.uniform(f"octave {octave}", 1, 2**octave + 1, 2**octave + 1)
        fine = F.interpolate(noise, (side, side), mode="bilinear", align_corners=True)
        total += fine[:, :, :height, :width] / decay**octave
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return ((total - low) / (high - low))[:, 0]


def by_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    found = []
    for image in (x * 255).round().byte().numpy():
        picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2))
        found.append(of_picture(change(picture)))
    return torch.from_numpy(np.stack(found)).float() / 255
