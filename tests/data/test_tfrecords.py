"""Files of TensorFlow Datasets are read without TensorFlow; here they are written byte by byte."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayproj.data.tfrecords import PublishedImages, parse, places
from rayproj.errors import UserError


def _varint(n: int) -> bytes:
    n &= 2**64 - 1
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def example(values: dict[str, object]) -> bytes:
    """A tf.train.Example by the wire format of its published fields."""
    entries = b""
    for name, value in values.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))
        elif isinstance(value, float):
            feature = _field(2, _field(1, struct.pack("<f", value)))
        else:
            feature = _field(3, _field(1, _varint(int(value))))  # type: ignore[call-overload]
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def record(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + b"crc1" + data + b"crc2"


def jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (level, 255 - level, 0)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def write_published(folder: Path, names: list[str], images: int = 5, files: int = 2) -> None:
    """As the benchmark's tars leave them."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        for k in range(files):
            rows = [
                {
                    "file_name": f"val_{i:03d}.JPEG".encode(),
                    "image": jpeg(40 * i + number),
                    "label": 100 + i,
                    "strength": 0.5 * i,
                }
                for i in range(images)
                if i % files == k
            ]
            path = folder / f"obfuscated_imagenet-validation_{name}.tfrecord-{k:05d}-of-{files:05d}"
            path.write_bytes(b"".join(record(example(row)) for row in rows))


def test_records_are_found_and_parsed() -> None:
    found = parse(example({"image": b"\0\xff", "label": 65, "negative": -3, "x": 1.5}))
    assert found == {"image": [b"\0\xff"], "label": [65], "negative": [-3], "x": [1.5]}


def test_the_published_layout_is_read(tmp_path: Path) -> None:
    names = ["Clean", "Halftoning"]
    write_published(tmp_path / "set" / "1.0.0", names)
    images = PublishedImages(str(tmp_path / "set"), ["Clean", "Halftoning", "LineShift"])
    assert images.header.sizes == (3, 2, 3, 2) and images.header.fields["obfuscation"].values == tuple(names)
    columns = images.gather(np.array([9, 0, 4]))
    assert columns["image_id"].tolist() == ["val_003.JPEG", "val_000.JPEG", "val_003.JPEG"]
    assert columns["label"].tolist() == [103, 100, 103] and columns["obfuscation"].tolist() == [1, 0, 0]
    assert np.abs(columns["image"][0, 0].astype(int) - 121).max() <= 2 and columns["image"].shape == (3, 3, 24, 24)
    assert json.loads(columns["parameters"][0]) == {"strength": [1.5]}


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    write_published(tmp_path / "a", ["Clean"])
    path = tmp_path / "a" / "obfuscated_imagenet-validation_Clean.tfrecord-00001-of-00002"
    data = path.read_bytes()
    (begin, size), _ = places(path)
    assert data[begin : begin + size].startswith(b"\n")
    path.write_bytes(data[:-3])
    with pytest.raises(UserError, match="00001-of-00002' is cut short at byte"):
        PublishedImages(str(tmp_path / "a"), ["Clean"])
    path.unlink()
    with pytest.raises(UserError, match="lacks file 1 of validation_Clean"):
        PublishedImages(str(tmp_path / "a"), ["Clean"])
    with pytest.raises(UserError, match="unpack the published tars"):
        PublishedImages(str(tmp_path / "a"), ["Halftoning"])
