"""How the arrays of a sample are stored as members of a tar: `<key>.<field>.<encoding>`."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Encoding:
    """A form of an array.

    Attributes:
        dtype: of the array when read.
        image: whether it is one, [C, H, W] with one or three channels.
    """

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]
    dtype: Any
    image: bool


def to_picture(image: np.ndarray) -> Image.Image:
    """Of uint8 [C, H, W] with one or three channels."""
    return Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)))


def of_picture(picture: Image.Image) -> np.ndarray:
    """uint8 [C, H, W]."""
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def luminance(images: np.ndarray) -> np.ndarray:
    """float64 [n, H, W] in [0, 255] of uint8 [n, C, H, W]; ITU-R BT.601."""
    x = images.astype(np.float64)
    return x[:, 0] if x.shape[1] == 1 else np.tensordot([0.299, 0.587, 0.114], x, axes=(0, 1))


def _image(form: str, **settings: Any) -> Encoding:
    def encode(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        to_picture(image).save(buffer, form, **settings)
        return buffer.getvalue()

    return Encoding(encode, decode_image, np.uint8, True)


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [C, H, W] of an image in any format."""
    return of_picture(Image.open(io.BytesIO(data)))


def _encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _encode_safetensors(array: np.ndarray) -> bytes:
    from safetensors.numpy import save

    return save({"x": np.ascontiguousarray(array)})


def _decode_safetensors(data: bytes) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)["x"]
    except SafetensorError as error:
        raise ValueError(str(error)) from error


ENCODINGS = {
    "png": _image("png", compress_level=3),
    "webp": _image("webp", lossless=True, quality=50, method=2, exact=True),  # of lossless ones, quality is effort
    "jpg": _image("jpeg", quality=95, subsampling=0),
    "npy": Encoding(_encode_npy, lambda data: np.load(io.BytesIO(data), allow_pickle=False), np.float32, False),
    "safetensors": Encoding(_encode_safetensors, _decode_safetensors, np.float32, False),
}
