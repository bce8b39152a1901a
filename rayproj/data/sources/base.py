"""What every source is, and how one is chosen."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rayproj.data.encodings import of_picture
from rayproj.errors import UserError


class SourceKind(Enum):
    fashion_mnist = "fashion_mnist"  # the subset in the package: 10,000 train, 2,000 test
    idx = "idx"  # a folder with the four idx files of an MNIST-like set
    emoji = "emoji"  # the captioned set in the package: 3,372 emoji in 4 styles
    image_folder = "image_folder"  # images and a CSV
    webdataset = "webdataset"  # any webdataset tars


class Channels(Enum):
    grey = "grey"
    rgb = "rgb"
    native = "native"  # as the source has them


@dataclass
class SourceConfig:
    """A set of labelled images somewhere."""

    kind: SourceKind = SourceKind.fashion_mnist
    path: str = ""  # idx: folder; image_folder: folder; webdataset: folder or glob of tars
    image_size: int = 32  # side in pixels; smaller grey images are padded, others resized
    # [height, width] each: an image goes to the one whose aspect ratio is nearest, scaled to fill it and cut at two sides;
    # each makes a dataset of its own, <part>/<height>x<width>. []: squares of image_size.
    buckets: list[list[int]] = field(default_factory=list)
    channels: Channels = Channels.native
    csv: str = "labels.csv"  # image_folder: file name below `path`
    file_column: str = "file"  # image_folder
    label_column: str = (
        "label"  # image_folder, emoji (category, style, tone, gender); webdataset: key of the json member
    )
    split_column: str = ""  # image_folder: a column with the names of the parts, instead of a split by key
    group_column: str = ""  # what must not be torn apart, such as the patient; "": every image by itself
    attributes: list[str] = field(default_factory=list)  # further columns to keep

    def problems(self) -> list[str]:
        if self.buckets and self.kind not in (SourceKind.image_folder, SourceKind.webdataset):
            return ["source.buckets are for image_folder and webdataset; the other sources have squares."]
        sound = all(len(b) == 2 and min(b) > 0 for b in self.buckets)
        return [] if sound else ["source.buckets: each is [height, width], both positive."]


@dataclass(frozen=True)
class Source:
    """Samples as dicts: "key", "image" uint8 [C, H, W], "label" int, the attributes, "split" ("train", "test" or what
    the source itself says) and "group" (what must stay together)."""

    name: str
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    licence: str
    attribution: str
    rows: Any  # a callable giving a fresh iterator of samples

    def samples(self) -> Iterator[dict[str, Any]]:
        return self.rows()  # type: ignore[no-any-return]


def open_source(config: SourceConfig) -> Source:
    """Open a source.

    Raises:
        UserError: a file, column or label that is missing or unreadable, named.
    """
    module = importlib.import_module(f"rayproj.data.sources.{config.kind.value}")
    return module.open(config)  # type: ignore[no-any-return]


def decode(data: bytes, name: str, config: SourceConfig) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image: transparent parts white, antialiased bicubic to the configured size, or to the
    bucket that it fits best.

    Raises:
        UserError: it is not an image.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"The image '{name}' cannot be decoded ({error}); repair it or take it out.") from error
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    grey = config.channels is Channels.grey or (
        config.channels is Channels.native and picture.mode in ("L", "1", "I;16")
    )
    picture = picture.convert("L" if grey else "RGB")
    if config.buckets:
        width, height = picture.size
        h, w = min(config.buckets, key=lambda b: abs(math.log(b[1] / b[0] * height / width)))
        picture = ImageOps.fit(picture, (w, h), Image.Resampling.BICUBIC)
    elif picture.size != (config.image_size, config.image_size):
        picture = picture.resize((config.image_size, config.image_size), Image.Resampling.BICUBIC)
    return of_picture(picture)
