"""The obfuscations written straight down with PIL, NumPy and SciPy, an image at a time: what ours are measured against.

They take the same drawn parameters and do the same; resampling differs as libraries do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from rayproj.obfuscation.assets import GLYPH, ICONS, TEXTS, dejavu
from rayproj.obfuscation.styles import StyleNetwork

Params = dict[str, Any]
Plain = Callable[[np.ndarray, Params, Sequence[np.ndarray]], np.ndarray]
"""(uint8 [H, W, 3], parameters, other pictures) to an image of the same shape."""


def _length(share: float, image: np.ndarray, least: int = 1) -> int:
    return max(least, round(share * min(image.shape[:2])))


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def color_noise_blocks(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    size, rng, out = _length(p["size"], image), np.random.default_rng(p["key"]), image.astype(np.int16)
    for y in range(0, image.shape[0], size):
        for x in range(0, image.shape[1], size):
            if rng.random() < p["share"]:
                offset = int(rng.uniform(-1, 1) * p["strength"] * 255)
                out[y : y + size, x : x + size, rng.integers(3)] += offset
    return out.clip(0, 255).astype(np.uint8)


def _shape(size: int, method: int) -> np.ndarray:
    """The share of a block that is covered by the shape that just reaches each pixel."""
    place = np.abs((np.arange(size) + 0.5) / size * 2 - 1)
    v, u = np.meshgrid(place, place, indexing="ij")
    if method == 0:
        radius = np.hypot(u, v)
        cut = np.maximum(radius, 1)
        outer = np.sqrt(cut**2 - 1) + cut**2 * (math.pi / 4 - np.arccos(1 / cut))
        return np.where(radius <= 1, math.pi / 4 * radius**2, outer)
    if method == 1:
        return np.maximum(u, v) ** 2
    return np.where(u + v <= 1, (u + v) ** 2 / 2, 1 - (2 - u - v) ** 2 / 2) if method == 2 else v


def halftoning(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    size, out = _length(p["size"], image, 2), np.zeros_like(image)
    shape = _shape(size, p["method"])
    for channel in range(3):
        begin = channel * (min(image.shape[:2]) // 96)
        for y in range(-begin, image.shape[0], size):
            for x in range(-begin, image.shape[1], size):
                place = slice(max(0, y), y + size), slice(max(0, x), x + size)
                block = image[(*place, channel)]
                if not block.size:
                    continue
                cut = shape[max(0, -y) :, max(0, -x) :][: block.shape[0], : block.shape[1]]
                out[(*place, channel)] = np.where(cut < block.mean() / 255, 255, 0)
    return out


def invert_lines(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    width, out = _length(p["width"], image), image.copy()
    view = out.transpose(1, 0, 2) if p["across"] else out
    for k in range(width * (1 - p["first"]), len(view), 2 * width):
        view[k : k + width] = 255 - view[k : k + width]
    return out


def low_contrast_triangles(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    leg = p["size"] * min(image.shape[:2])
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    v, u = y / leg, (x + p["shear"] * y) / leg
    kind = (np.floor(u) + np.floor(v) + 2 * ((u % 1) + (v % 1) > 1)).astype(int) % 3
    level, contrast = (np.array(p[name])[kind][..., None] for name in ("level", "contrast"))
    return _bytes(level + contrast * (image - level))


def line_shift(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    width, shift, out = _length(p["width"], image), _length(p["shift"], image), image.copy()
    view = out.transpose(1, 0, 2) if p["across"] else out
    for number, k in enumerate(range(0, len(view), width)):
        view[k : k + width] = np.roll(view[k : k + width], shift if number % 2 else -shift, axis=1)
    return out


def _coefficients(points: np.ndarray, onto: np.ndarray) -> np.ndarray:
    rows, values = [], []
    for (x, y), (u, v) in zip(points, onto, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.asarray(np.linalg.solve(np.array(rows), np.array(values)))


def _projected(image: np.ndarray, coefficients: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    return picture.transform(
        picture.size, Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BILINEAR
    )


def perspective_transform(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    centres = np.array([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]]) * [width, height]
    moved = centres + np.array(p["moved"]).reshape(4, 2) * min(height, width)
    return np.asarray(_projected(image, _coefficients(moved, centres)))


def rotate_blocks(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    size, rng, out = _length(p["size"], image, 2), np.random.default_rng(p["key"]), image.copy()
    for y in range(0, image.shape[0] - size + 1, size):
        for x in range(0, image.shape[1] - size + 1, size):
            block = image[y : y + size, x : x + size]
            out[y : y + size, x : x + size] = np.rot90(block, int(rng.integers(1, 4)))
    return out


def rotate_image(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).rotate(p["angle"], Image.Resampling.BILINEAR))


def _warped(image: np.ndarray, y: Any, x: Any, mode: str = "grid-constant") -> np.ndarray:
    """Each channel at its places, [3, H, W] or [H, W]."""
    ys, xs = (np.broadcast_to(c, (3, *image.shape[:2])) for c in (y, x))
    found = [
        ndimage.map_coordinates(image[..., c].astype(np.float32), [ys[c], xs[c]], order=1, mode=mode) for c in range(3)
    ]
    return np.stack(found, -1)


def swirl_warp(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    cx, cy = p["centre"][0] * (width - 1), p["centre"][1] * (height - 1)
    rho, theta = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
    strength = -p["strength"] if p["clockwise"] else p["strength"]
    theta = theta + strength * np.exp(-rho * 5 * math.log(2) / (p["radius"] * min(height, width)))
    return _bytes(_warped(image, cy + rho * np.sin(theta), cx + rho * np.cos(theta)))


def wavy_color_warp(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    ys, xs = [], []
    for channel in range(3):
        phase = [value + channel * p["lag"] for value in p["phase"]]
        tall = [value * min(height, width) for value in p["height"]]
        ys.append(y + tall[0] * np.sin(phase[0] + 2 * math.pi * p["waves"][0] * x / width))
        xs.append(x + tall[1] * np.sin(phase[1] + 2 * math.pi * p["waves"][1] * y / height))
    waved = _warped(image, np.stack(ys), np.stack(xs), "nearest")
    angle = math.radians(p["hue"])
    ones, cross = np.ones((3, 3)), np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * np.eye(3) + (1 - math.cos(angle)) / 3 * ones + math.sin(angle) * cross
    return _bytes(waved @ turn.T)


def _pasted(image: np.ndarray, size: float, top: float, left: float, canvas: Image.Image) -> np.ndarray:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((round(size * width), round(size * height)), Image.Resampling.BILINEAR)
    canvas.paste(small, (round(left * (width - small.width)), round(top * (height - small.height))))
    return np.asarray(canvas)


def _blurred(image: np.ndarray, share: float) -> Image.Image:
    return Image.fromarray(image).filter(ImageFilter.GaussianBlur(share * min(image.shape[:2])))


def background_blur_composition(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    return _pasted(image, p["size"], p["place"][0], p["place"][1], _blurred(image, p["blur"]))


def high_contrast_border(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    noise = np.random.default_rng(p["key"]).integers(0, 256, image.shape, np.uint8)
    faint = _bytes(p["level"] + p["contrast"] * (image - p["level"]))
    return _pasted(faint, p["size"], 0.5, 0.5, Image.fromarray(noise))


def photo_composition(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    return _pasted(image, p["size"], p["place"][0], p["place"][1], Image.fromarray(photos[p["photo"] % len(photos)]))


def perspective_composition(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    inner = corner + (1 - 2 * corner) * np.array(p["corners"]).reshape(4, 2)
    coefficients = _coefficients(inner * [width, height], corner * [width, height])
    canvas = Image.fromarray(photos[p["photo"] % len(photos)])
    mask = Image.new("L", canvas.size)
    ImageDraw.Draw(mask).polygon([tuple(point) for point in (inner * [width, height]).tolist()], fill=255)
    canvas.paste(_projected(image, coefficients), mask=mask)
    return np.asarray(canvas)


def _colour(hue: float) -> np.ndarray:
    return np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * 255


def color_pattern_overlay(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    cell = min(image.shape[:2]) / p["count"]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    v, u = (y + 0.5) / cell, (x + 0.5) / cell
    if p["pattern"] == 0:
        shown = ((u + np.floor(v) % 2 / 2) % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 > 0.35**2
    else:
        shown = (np.floor(u) + np.floor(v)) % 2 == 0 if p["pattern"] == 1 else (u + v) % 2 < 1
    weight = np.expand_dims(np.where(shown, p["opacity"], p["tint"]), -1)
    light = np.expand_dims(np.asarray(Image.fromarray(image).convert("L")), -1)
    return _bytes(light + (_colour(p["hue"]) - light) * weight)


@lru_cache(64)
def _icon(number: int) -> Image.Image:
    picture = Image.new("L", (GLYPH, GLYPH))
    font = dejavu(round(0.85 * GLYPH))
    ImageDraw.Draw(picture).text((GLYPH / 2, GLYPH / 2), ICONS[number % len(ICONS)], 255, font, anchor="mm")
    return picture


def icon_overlay(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    cell = min(height, width) / p["count"]
    icon = _icon(p["icon"]).resize((round(cell), round(cell)), Image.Resampling.BILINEAR)
    icon = icon.point(lambda value: round(value * p["opacity"]))
    canvas, colour = Image.fromarray(image), tuple(_colour(p["hue"]).round().astype(int).tolist())
    for y in range(math.ceil(height / cell)):
        for x in range(math.ceil(width / cell)):
            canvas.paste(colour, (round(x * cell), round(y * cell)), icon)
    return np.asarray(canvas)


def image_overlay(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    other = photos[p["photo"] % len(photos)]
    return np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(other), p["opacity"]))


def interleave(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    width, out, other = _length(p["width"], image), image.copy(), photos[p["photo"] % len(photos)]
    view, other = (a.transpose(1, 0, 2) if p["across"] else a for a in (out, other))
    for k in range(width, len(view), 2 * width):
        view[k : k + width] = other[k : k + width]
    return out


def text_overlay(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    line = _length(p["size"], image, 4)
    font, text = dejavu(round(0.75 * line)), TEXTS[p["text"] % len(TEXTS)]
    long = round(1.5 * max(height, width))
    layer = Image.new("L", (long, long))
    draw, step = ImageDraw.Draw(layer), font.getlength(text) + line / 2
    for y in range(long // line + 1):
        for x in range(int(long // step) + 1):
            draw.text((x * step, (y + 0.5) * line), text, 255, font, anchor="lm")
    layer = layer.rotate(-p["angle"], Image.Resampling.BILINEAR)
    left, top = (long - width) // 2, (long - height) // 2
    mask = layer.crop((left, top, left + width, top + height)).point(lambda value: round(value * p["opacity"]))
    canvas = Image.fromarray(image)
    canvas.paste(tuple(_colour(p["hue"] % 1).round().astype(int).tolist()), (0, 0, width, height), mask)
    return np.asarray(canvas)


def adversarial_patches(patches: Sequence[np.ndarray]) -> Plain:
    def changed(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
        height, width = image.shape[:2]
        around = _blurred(image, min(4 / min(height, width), 0.1))
        canvas = Image.fromarray(_pasted(image, p["size"], 0.5, 0.5, around))
        side = _length(p["patch_size"], image)
        patch = Image.fromarray(patches[p["patch"] % len(patches)]).resize((side, side), Image.Resampling.BILINEAR)
        for place in ((0, 0), (width - side, 0), (0, height - side), (width - side, height - side)):
            canvas.paste(patch, place)
        return np.asarray(canvas)

    return changed


def repainted(network: StyleNetwork, first: int, count: int) -> Plain:
    """By the same network, an image at a time, and mixed by NumPy."""

    def changed(image: np.ndarray, p: Params, photos: Sequence[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            x = torch.from_numpy(image).permute(2, 0, 1).float()[None]
            painted = network(x, torch.tensor([first + p["style"] % count]))[0].permute(1, 2, 0).numpy()
        mixed = image + p["strength"] * (painted - image)
        if "colour" in p:
            grey = (mixed @ [0.299, 0.587, 0.114])[..., None]
            mixed = grey + p["colour"] * (mixed - grey)
        return _bytes(mixed)

    return changed


def learned(patches: Sequence[np.ndarray], styles: StyleNetwork) -> dict[str, Plain]:
    """Of those that need something learned, by what was."""
    return {
        "AdversarialPatches": adversarial_patches(patches),
        "StyleTransfer": repainted(styles, 0, styles.pictures),
        "Texturize": repainted(styles, styles.pictures, styles.textures),
    }


PLAIN: dict[str, Plain] = {
    "BackgroundBlurComposition": background_blur_composition,
    "ColorNoiseBlocks": color_noise_blocks,
    "Halftoning": halftoning,
    "HighContrastBorder": high_contrast_border,
    "IconOverlay": icon_overlay,
    "ImageOverlay": image_overlay,
    "Interleave": interleave,
    "InvertLines": invert_lines,
    "LineShift": line_shift,
    "PerspectiveTransform": perspective_transform,
    "PhotoComposition": photo_composition,
    "RotateBlocks": rotate_blocks,
    "RotateImage": rotate_image,
    "SwirlWarp": swirl_warp,
    "TextOverlay": text_overlay,
    "WavyColorWarp": wavy_color_warp,
    "ColorPatternOverlay": color_pattern_overlay,
    "LowContrastTriangles": low_contrast_triangles,
    "PerspectiveComposition": perspective_composition,
}
