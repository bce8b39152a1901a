"""Arithmetic of images [B, C, H, W] with a parameter for each: places, sampling, blocks, colours.

What is not exact in floating point and is looked up by a table or a vector instruction (sines, exponentials) is computed in
fp64 and then rounded, so that an image comes out the same, bit for bit, wherever it stands in a batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj import keyed

TABLE = 32  # blocks along each side that are drawn by themselves; beyond, they repeat


def per_image(value: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1]."""
    return value[:, None, None, None]


def side(images: Tensor) -> int:
    return min(images.shape[2:])


def length(share: Tensor, images: Tensor, least: int = 1) -> Tensor:
    """Pixels, int64 [B], of shares of the shorter side."""
    return (share.double() * side(images)).round().long().clamp(min=least)


def to_bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def places(images: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """y int64 [1, H, 1] and x [1, 1, W] of all pixels, where `by` is."""
    y, x = (torch.arange(n, device=by.device) for n in images.shape[2:])
    return y[None, :, None], x[None, None, :]


def bands(images: Tensor, width: Tensor, across: Tensor) -> Tensor:
    """uint8 [B, H, W]: 0 and 1 in turn in bands of rows, or of columns where `across` [B] is 1, of `width` [B] pixels."""
    y, x = places(images, width)
    rows, columns = ((p.flatten() // width[:, None] % 2).to(torch.uint8) for p in (y, x))
    upright = across.to(torch.uint8)[:, None]
    return (rows * (1 - upright))[:, :, None] + (columns * upright)[:, None, :]


def taken(images: Tensor, place: Tensor) -> Tensor:
    """The pixels at whole places y W + x, int64 [B, H, W]."""
    batch, channels = images.shape[:2]
    place = place.view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, place).view_as(images)


def sampled(images: Tensor, y: Tensor, x: Tensor, outside: str = "zeros") -> Tensor:
    """fp32 [B, C, h, w]: bilinear between pixels, at places fp32 in pixels that broadcast to [B, h, w]; outside black, or
    with "border" what is nearest."""
    height, width = images.shape[2:]
    x, y = (p * (2 / n) + (1 / n - 1) for p, n in ((x, width), (y, height)))
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode=outside, align_corners=False)


def spread(table: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """[B, C, H, W]: for each pixel the entry of a table [B, C, n, m], by int64 y [B, H] and x [B, W] modulo n and m."""
    channels, n, m = table.shape[1:]
    rows, columns = (y % n)[:, None, :, None], (x % m)[:, None, None, :]
    found = table.gather(2, rows.expand(-1, channels, -1, m))
    return found.gather(3, columns.expand(-1, channels, y.shape[1], -1))


def blocks(images: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the blocks of the pixels, int64 [B, H] and [B, W], of blocks of so many pixels [B]."""
    y, x = places(images, size)
    return y[:, :, 0] // size[:, None], x[:, 0] // size[:, None]


def drawn(stream: str, number: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniforms fp32 [B, *shape] by the key of each image, int64 [B]."""
    row = torch.stack([number, torch.zeros_like(number), torch.zeros_like(number)], dim=1)
    return keyed.uniform(0, stream, row, shape)


def block_means(images: Tensor, size: Tensor, offset: int = 0) -> Tensor:
    """fp32 [B, C, H, W]: the mean of the block that each pixel is in, of blocks of `size` [B] pixels, the first of which has
    lost `offset` of them; exact sums."""
    height, width = images.shape[2:]
    total = F.pad(images.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32), (1, 0, 1, 0))
    least, size = int(size.min()), size[:, None]
    corners, edges = total, []
    for axis, n in ((2, height), (3, width)):
        count = torch.arange((n + offset) // least + 2, device=images.device)
        edge = (count * size - offset).clamp(0, n)
        edges.append((edge[:, 1:] - edge[:, :-1]).clamp(min=1))
        shape = (-1, 1, len(count), 1) if axis == 2 else (-1, 1, 1, len(count))
        sizes = [-1, images.shape[1], corners.shape[2], corners.shape[3]]
        sizes[axis] = len(count)
        corners = corners.gather(axis, edge.view(shape).expand(sizes))
    sums = corners[:, :, 1:, 1:] - corners[:, :, :-1, 1:] - corners[:, :, 1:, :-1] + corners[:, :, :-1, :-1]
    means = sums / (edges[0][:, None, :, None] * edges[1][:, None, None])
    y, x = places(images, size)
    return spread(means, (y[:, :, 0] + offset) // size, (x[:, 0] + offset) // size)


def projective(points: Tensor, onto: Tensor) -> Tensor:
    """fp64 [B, 3, 3]: the matrix that takes four points [B, 4, 2] of (x, y) onto four others (Hartley and Zisserman 2004,
    section 4.1, with the last entry 1)."""
    p, q = points.double(), onto.double()
    one, zero = torch.ones_like(p[..., :1]), torch.zeros_like(p)
    rows = [torch.cat([p, one, zero, zero[..., :1], -q[..., :1] * p], -1)]
    rows += [torch.cat([zero, zero[..., :1], p, one, -q[..., 1:] * p], -1)]
    solved = torch.linalg.solve(torch.cat(rows, 1), torch.cat([q[..., 0], q[..., 1]], 1))
    return torch.cat([solved, torch.ones_like(solved[:, :1])], 1).view(-1, 3, 3)


def projected(matrix: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where a matrix [B, 3, 3] takes the pixels: y and x, fp32 [B, H, W]; far outside, what lies behind one who sees the
    middle of the frame."""
    height, width = images.shape[2:]
    y, x = (p.double() for p in places(images, matrix))
    a = matrix[:, :, :, None, None]
    depth = a[:, 2, 0] * x + a[:, 2, 1] * y + a[:, 2, 2]
    middle = a[:, 2, 0] * (width - 1) / 2 + a[:, 2, 1] * (height - 1) / 2 + a[:, 2, 2]
    there = [(a[:, k, 0] * x + a[:, k, 1] * y + a[:, k, 2]) / depth for k in (1, 0)]
    seen = depth * middle.sign() > 1e-6
    return tuple(torch.where(seen, p, -1e6).float() for p in there)  # type: ignore[return-value]


def inset(images: Tensor, size: Tensor, top: Tensor, left: Tensor, halve: bool = True) -> tuple[Tensor, Tensor]:
    """Images made smaller, at a place of the frame: fp32 [B, C, H, W], and where they are, bool [B, 1, H, W].

    Args:
        size: share of the sides, [B].
        top, left: of the room that is left, [B] in [0, 1].
        halve: average pixels by twos before they are sampled, for sizes about a half and less.
    """
    height, width = images.shape[2:]
    y, x = (p.double() for p in places(images, size))
    s = size.double()[:, None, None]
    free = 1 - s
    y = (y + 0.5 - top[:, None, None] * free * height) / s - 0.5
    x = (x + 0.5 - left[:, None, None] * free * width) / s - 0.5
    inside = (y >= -0.5) & (y < height - 0.5) & (x >= -0.5) & (x < width - 0.5)
    y, x = (p.clamp(0, n - 1).float() for p, n in ((y, height), (x, width)))
    if halve:
        return sampled(F.avg_pool2d(images.float(), 2, ceil_mode=True), (y - 0.5) / 2, (x - 0.5) / 2), inside[:, None]
    return sampled(images, y, x), inside[:, None]


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """fp32 [B, C, H, W]: strongly blurred, by Gaussians of `sigma` [B], a share of the shorter side, on fewer pixels."""
    height, width = images.shape[2:]
    factor = max(1, side(images) // 56)
    few = F.avg_pool2d(images.float(), factor, ceil_mode=True).double()
    for axis in (2, 3):
        n = few.shape[axis]
        place = torch.arange(n, device=images.device).double()
        wide = (sigma.double() * side(images) / factor)[:, None, None]
        weight = torch.exp(-((place[:, None] - place[None]) ** 2) / (2 * wide**2))
        weight = (weight / weight.sum(2, keepdim=True))[:, None]
        few = weight @ few if axis == 2 else few @ weight.mT
    return F.interpolate(few.float(), size=(height, width), mode="bilinear", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """Luminance [B, 1, H, W] of [B, C, H, W]; ITU-R BT.601."""
    if x.shape[1] == 1:
        return x
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def saturated(hue: Tensor, channels: int) -> Tensor:
    """fp32 [B, C, 1, 1] in [0, 255]: the colour of a hue [B] in [0, 1), or its luminance."""
    offset = torch.tensor([0.0, 4.0, 2.0], device=hue.device)
    found = (((6 * hue[:, None] + offset) % 6 - 3).abs() - 1).clamp(0, 1)[:, :, None, None] * 255
    return found if channels == 3 else grey(found)


def hue_turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Colours [B, 3, H, W] turned about the axis of the greys, by `degrees` [B]; grey images stay."""
    if x.shape[1] == 1:
        return x
    angle = degrees.double() * (math.pi / 180)
    cos, sin = (per_image(f(angle).float()) for f in (torch.cos, torch.sin))
    mean, (r, g, b) = x.mean(1, keepdim=True), x.split(1, dim=1)
    # Rodrigues' formula about (1, 1, 1) / √3.
    crossed = torch.cat([b - g, r - b, g - r], 1) / math.sqrt(3)
    return cos * x + (1 - cos) * mean + sin * crossed


def mixed(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x where the weight is 0, y where it is 1."""
    return x + (y - x) * weight
