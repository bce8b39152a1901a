"""What every source is, and how one is chosen."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rayproj.config import below
from rayproj.data.encodings import of_picture
from rayproj.data.split import ROLES
from rayproj.errors import UserError


class SourceKind(Enum):
    fashion_mnist = "fashion_mnist"  # the subset in the package: 10,000 train, 2,000 test
    idx = "idx"  # a folder with the four idx files of an MNIST-like set
    emoji = "emoji"  # the captioned set in the package: 3,372 emoji in 4 styles
    image_folder = "image_folder"  # images and a CSV
    webdataset = "webdataset"  # any webdataset tars
    camelyon17 = "camelyon17"  # patches of lymph nodes from five hospitals, as WILDS has them
    chexpert = "chexpert"  # chest radiographs of Stanford
    chestxray14 = "chestxray14"  # and of the NIH


TABLES = (SourceKind.image_folder, SourceKind.camelyon17, SourceKind.chexpert, SourceKind.chestxray14)


class Uncertain(Enum):
    """What an observation that its report is uncertain of is (Irvin et al. 2019, "CheXpert", section 3.1)."""

    zeros = "zeros"  # absent
    ones = "ones"  # present
    unlabelled = "unlabelled"  # an image without a label

    @property
    def label(self) -> int:
        return {"zeros": 0, "ones": 1, "unlabelled": -1}[self.value]


class Channels(Enum):
    grey = "grey"
    rgb = "rgb"
    native = "native"  # as the source has them


@dataclass
class SourceConfig:
    """A set of labelled images somewhere."""

    kind: SourceKind = SourceKind.fashion_mnist
    path: str = ""  # a folder; webdataset: folder or glob of tars
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
    # Further ones to keep; []: all, but none of a folder or tars, nor the tone of idx and fashion_mnist.
    attributes: list[str] = field(default_factory=list)
    # Part of the source -> what it is for: train, unlabelled, id_val, id_test, ood_val or ood_test, or "" to leave it out.
    # Of image_folder the names in split_column, such as those of sites; other sources of tables say what they have.
    roles: dict[str, str] = field(default_factory=dict)
    unlabelled: str = ""  # camelyon17: folder of the unlabelled patches
    uncertain: Uncertain = Uncertain.zeros  # chexpert
    demographics: str = ""  # chexpert: CSV of the separate file, for race

    def problems(self) -> list[str]:
        if wrong := below(1, "source", self, "image_size"):
            return wrong
        if self.roles and self.kind not in TABLES:
            return [
                f"source.roles are for {', '.join(kind.value for kind in TABLES)}; of other sources use data.fractions."
            ]
        if wrong := sorted(set(self.roles.values()) - {*ROLES, ""}):
            return [f"source.roles: '{wrong[0]}' is none of {', '.join(ROLES)}."]
        if self.buckets and self.kind not in (SourceKind.image_folder, SourceKind.webdataset):
            return ["source.buckets are for image_folder and webdataset; the other sources have squares."]
        sound = all(len(b) == 2 and min(b) > 0 for b in self.buckets)
        return [] if sound else ["source.buckets: each is [height, width], both positive."]


@dataclass(frozen=True)
class Source:
    """Samples as dicts: "key", "image" uint8 [C, H, W], "label" int (-1: not known), the attributes, "split" ("train",
    "test", one of `rayproj.data.split.ROLES` or what the source itself says) and "group" (what must stay together)."""

    name: str
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    licence: str
    attribution: str
    # Gives a fresh iterator of samples, of which "image" may also be a function that gives it.
    rows: Callable[[], Iterator[dict[str, Any]]]

    def samples(self) -> Iterator[dict[str, Any]]:
        return ({**row, "image": pixels(row)} for row in self.rows())


def pixels(sample: dict[str, Any]) -> np.ndarray:
    """uint8 [C, H, W]: the image of a sample of `Source.rows`."""
    image = sample["image"]
    return image() if callable(image) else image  # type: ignore[no-any-return]


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
