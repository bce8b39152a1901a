"""What plain image processing can say of a drawing on an even ground: how many things there are, and of what colour."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# sRGB of the eleven basic colour terms (Berlin and Kay 1969); what is nearest in CIELAB is what a pixel is called.
BASIC = {
    "black": (20, 20, 20),
    "blue": (40, 90, 220),
    "brown": (120, 72, 40),
    "grey": (128, 128, 128),
    "green": (60, 160, 70),
    "orange": (245, 140, 30),
    "pink": (245, 150, 190),
    "purple": (130, 60, 170),
    "red": (215, 35, 45),
    "white": (250, 250, 250),
    "yellow": (250, 210, 60),
}
UNLIKE = 24.0  # from which distance to the ground, in levels of 0 to 255 over all channels, a pixel belongs to a thing
LEAST = 0.004  # share of the image below which a component is a speck


def foreground(image: np.ndarray) -> np.ndarray:
    """bool [H, W] of uint8 [C, H, W]: what is unlike the ground, which is the median of the border."""
    border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    ground = np.median(border, axis=1)[:, None, None]
    found: np.ndarray = np.abs(image - ground).max(0) > UNLIKE
    return found


def components(image: np.ndarray) -> int:
    """How many separate things there are: connected components of the foreground (eight neighbours), without specks and
    with their holes filled. Things that touch are one, so this is a measure for drawings on an even ground."""
    filled = ndimage.binary_fill_holes(foreground(image))
    label, count = ndimage.label(filled, np.ones((3, 3)))
    sizes = np.bincount(label.ravel(), minlength=count + 1)[1:]
    return int((sizes >= max(2, LEAST * filled.size)).sum())


def main_colour(image: np.ndarray) -> str:
    """The basic colour that most of the foreground has, by `BASIC`; of an empty image that of its ground."""
    there = foreground(image)
    pixels = image[:, there] if there.any() else image.reshape(len(image), -1)
    pixels = np.broadcast_to(pixels, (3, pixels.shape[1]))
    names = list(BASIC)
    known = lab(np.array(list(BASIC.values()), np.float64))
    nearest = ((lab(pixels.T.astype(np.float64))[:, None] - known) ** 2).sum(2).argmin(1)
    return names[int(np.bincount(nearest, minlength=len(names)).argmax())]


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB [n, 3] in 0 to 255 (IEC 61966-2-1; CIE 15)."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
