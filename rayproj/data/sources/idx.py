"""MNIST-like sets: a folder with four idx files, gzipped or not."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rayproj.data.sources.base import Channels, Source, SourceConfig
from rayproj.errors import UserError

FASHION = (
    "T-shirt or top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

TONE = "tone"


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes.

    Raises:
        UserError: it is missing or not such a file.
    """
    try:
        data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"There is no '{path}'; give source.path a folder with the four idx files, such as "
            "/usr/share/datasets/fashion-mnist after 'apt-get install dataset-fashion-mnist'."
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); fetch it again.") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError(f"'{path}' is not an idx file of bytes; fetch it again.")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = data[4 + 4 * len(shape) :]
    if len(body) != int(np.prod(shape)):
        raise UserError(f"'{path}' is cut short: {len(body)} bytes for a shape of {shape}; fetch it again.")
    return np.frombuffer(body, np.uint8).reshape(shape)


def open(config: SourceConfig) -> Source:
    folder = Path(config.path)
    names = FASHION if "fashion" in config.path else ()
    return idx_source(config, folder, "idx", names, licence="", attribution="")


def idx_source(
    config: SourceConfig, folder: Path, name: str, classes: tuple[str, ...], licence: str, attribution: str
) -> Source:
    """The images of the four files in `folder`, padded with zeros to the configured size.

    With source.attributes=[tone] each has its tone, dark or light: whether what is shown is below or above the middle
    grey in the mean. It is the one group that anybody can see in such images.
    """
    if unknown := [one for one in config.attributes if one != TONE]:
        raise UserError(f"source.attributes: '{unknown[0]}' is nothing that {name} has; there is {TONE}.")
    parts = {split: _read_part(folder, prefix) for split, prefix in (("train", "train"), ("test", "t10k"))}
    labels = np.concatenate([part[1] for part in parts.values()])
    classes = classes or tuple(str(label) for label in range(int(labels.max()) + 1))
    side = parts["train"][0].shape[1]
    if config.image_size < side:
        raise UserError(f"source.image_size={config.image_size} is less than the images' {side}; give at least {side}.")
    channels = 3 if config.channels is Channels.rgb else 1

    def rows() -> Iterator[dict[str, Any]]:
        before = (config.image_size - side) // 2
        after = config.image_size - side - before
        for split, (images, targets) in parts.items():
            for i, (image, label) in enumerate(zip(images, targets, strict=True)):
                padded = np.pad(image, (before, after))[None].repeat(channels, axis=0)
                yield {
                    "key": f"{split}-{i:06d}",
                    "image": padded,
                    "label": int(label),
                    "split": split,
                    "group": f"{split}-{i:06d}",
                    **({TONE: tone(image)} if config.attributes else {}),
                }

    return Source(name, classes, tuple(config.attributes), licence, attribution, rows)


def tone(image: np.ndarray) -> str:
    """Of uint8 [H, W] on black ground."""
    shown = image[image > 0]
    return "light" if shown.size and shown.mean() >= 128 else "dark"


def _read_part(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{prefix}-{kind}"
        found.append(read_idx(plain if plain.exists() else plain.with_name(plain.name + ".gz")))
    images, labels = found
    if len(images) != len(labels):
        raise UserError(f"In '{folder}' there are {len(images)} {prefix} images but {len(labels)} labels.")
    return images, labels
