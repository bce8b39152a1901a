"""Procedural pictures, which belong to nobody: scenes to compose with, paintings and textures to take styles from.

Each is a function of its number alone.
"""

from __future__ import annotations

import numpy as np
import scipy
import torch
from torch import Tensor

SIDE = 128


def pictures(count: int) -> Tensor:
    """uint8 [count, 3, 128, 128]: a sky and hills of cloudy colours, with discs and boxes before them."""
    return _stack([_scene(np.random.default_rng([0, i])) for i in range(count)])


def paintings(count: int) -> Tensor:
    """uint8 [count, 3, 128, 128]: mosaics, strokes along swirls and dots, in turn, each of a palette of its own."""
    kinds = (_mosaic, _strokes, _dots)
    return _stack([kinds[i % 3](np.random.default_rng([1, i])) for i in range(count)])


def textures(count: int) -> Tensor:
    """uint8 [count, 3, 128, 128]: grain, cracks, weave and bricks, in turn; nearly grey."""
    kinds = (_grain, _cracks, _weave, _bricks)
    found = []
    for i in range(count):
        rng = np.random.default_rng([2, i])
        t = kinds[i % 4](rng)
        t = (t - t.min()) / max(float(np.ptp(t)), 1e-9)
        found.append(t[:, :, None] * (1 + 0.06 * rng.normal(size=3)) * 235)
    return _stack(found)


def _stack(found: list[np.ndarray]) -> Tensor:
    """Of [128, 128, 3]."""
    return torch.from_numpy(np.stack([np.clip(x, 0, 255).round().astype(np.uint8) for x in found])).permute(0, 3, 1, 2)


def _clouds(rng: np.random.Generator, slope: float) -> np.ndarray:
    """[128, 128] of mean 0 and deviation 1, with a spectrum of 1 / f^slope, as that of photographs at slope 1."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    f[0, 0] = 1
    x = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / f**slope).real
    return np.asarray((x - x.mean()) / x.std())


def _palette(rng: np.random.Generator, size: int) -> np.ndarray:
    """[size, 3]: colours about a hue and the one opposite."""
    hue = rng.uniform() + np.where(rng.uniform(size=size) < 0.7, 0, 0.5) + 0.06 * rng.normal(size=size)
    pure = np.clip(np.abs((6 * hue[:, None] + [0, 4, 2]) % 6 - 3) - 1, 0, 1)
    saturation, value = rng.uniform(0.2, 0.9, (size, 1)), rng.uniform(60, 250, (size, 1))
    return np.asarray(value * (1 - saturation * (1 - pure)))


def _scene(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    sky, land, *things = _palette(rng, 7)
    picture = sky + np.stack([12 * _clouds(rng, 1.5)] * 3, -1)
    for layer in range(3):
        top = 0.35 + 0.2 * layer + 0.05 * np.sin(2 * np.pi * (rng.uniform(1, 4) * x + rng.uniform()))
        hills = land * (0.6 + 0.2 * layer) + np.stack([18 * _clouds(rng, 1.0)] * 3, -1)
        picture = np.where((y > top)[..., None], hills, picture)
    for colour in things:
        cy, cx, r = rng.uniform(0.15, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.04, 0.16)
        disc = np.hypot(y - cy, x - cx) < r
        box = (np.abs(y - cy) < r) & (np.abs(x - cx) < r * rng.uniform(0.4, 1.6))
        light = (1.1 - (y - cy) / (3 * r))[..., None]
        picture = np.where((disc if rng.uniform() < 0.5 else box)[..., None], colour * light, picture)
    return np.asarray(picture)


def _cells(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of the nearest of so many points for each pixel, and the distance to where the next is as near."""
    from scipy.spatial import cKDTree

    points = rng.uniform(0, SIDE, (count, 2))
    points = np.concatenate([points + np.array([dy, dx]) for dy in (-SIDE, 0, SIDE) for dx in (-SIDE, 0, SIDE)])
    distance, number = cKDTree(points).query(np.argwhere(np.ones((SIDE, SIDE))), k=2)
    return (number[:, 0] % count).reshape(SIDE, SIDE), (distance[:, 1] - distance[:, 0]).reshape(SIDE, SIDE)


def _mosaic(rng: np.random.Generator) -> np.ndarray:
    number, edge = _cells(rng, 160)
    colours = _palette(rng, 160)
    return np.asarray(colours[number] * np.where(edge < 1.2, 0.25, 1.0)[..., None])


def _strokes(rng: np.random.Generator) -> np.ndarray:
    """Colours smeared along the lines of a swirling field."""
    colours = _palette(rng, 6)
    picture = colours[rng.integers(0, 6, (SIDE // 2, SIDE // 2))].repeat(2, 0).repeat(2, 1)
    angle = 2.5 * _clouds(rng, 2.5)
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    total = np.zeros_like(picture)
    for sign in (1, -1):
        py, px = y.copy(), x.copy()
        for _ in range(10):
            place = [py % SIDE, px % SIDE]
            here = scipy.ndimage.map_coordinates(angle, place, order=1, mode="wrap")
            py, px = py + sign * np.sin(here), px + sign * np.cos(here)
            total += np.stack(
                [scipy.ndimage.map_coordinates(c, place, order=1, mode="wrap") for c in picture.transpose(2, 0, 1)], -1
            )
    smeared = total / 20
    return np.asarray(smeared.mean() + 1.8 * (smeared - smeared.mean()))


def _dots(rng: np.random.Generator) -> np.ndarray:
    colours, picture = _palette(rng, 8), np.full((SIDE, SIDE, 3), 235.0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for _ in range(900):
        cy, cx, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(1.5, 4)
        dy, dx = (np.abs(p - c) for p, c in ((y, cy), (x, cx)))
        picture[np.minimum(dy, SIDE - dy) ** 2 + np.minimum(dx, SIDE - dx) ** 2 < r * r] = colours[rng.integers(8)]
    return picture


def _grain(rng: np.random.Generator) -> np.ndarray:
    y = np.mgrid[:SIDE, :SIDE][0]
    return np.asarray(np.sin((y + 9 * _clouds(rng, 2.0)) * rng.uniform(0.4, 0.9)) + 0.4 * _clouds(rng, 0.5))


def _cracks(rng: np.random.Generator) -> np.ndarray:
    _, edge = _cells(rng, 60)
    return np.asarray(np.minimum(edge, 3) + 0.5 * _clouds(rng, 0.8))


def _weave(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] * 2 * np.pi / 16
    over = ((y // np.pi + x // np.pi) % 2).astype(bool)
    return np.asarray(np.where(over, np.abs(np.sin(y)), np.abs(np.sin(x))) + 0.12 * rng.normal(size=(SIDE, SIDE)))


def _bricks(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    row = y // 16
    across = x + 16 * (row % 2)
    joint = (y % 16 < 2) | (across % 32 < 2)
    tone = rng.uniform(0.4, 0.9, (8, 5))[row, across // 32]
    return np.asarray(np.where(joint, 0.05, tone + 0.08 * _clouds(rng, 0.8)))
