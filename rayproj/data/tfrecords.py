"""TFRecord files of labelled images, as TensorFlow Datasets writes them, without TensorFlow.

`NAME-SPLIT.tfrecord-00000-of-00005`: records of a length, its checksum, a `tf.train.Example` and its checksum. Checksums are
not looked at; what is cut short is found by its length.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rayproj.data.dataset import Field, Header
from rayproj.data.encodings import decode_image
from rayproj.errors import UserError

NAME = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>\d{5})-of-(?P<count>\d{5})")


def places(path: Path) -> list[tuple[int, int]]:
    """Where each record of a file begins and how long it is, in bytes.

    Raises:
        UserError: the file is cut short.
    """
    found, position, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            head = file.read(12)
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else size
            if position + 16 + length > size:
                raise UserError(f"'{path}' is cut short at byte {position:,}; fetch it again.")
            found.append((position + 12, length))
            position += 16 + length
    return found


@lru_cache(1)
def _example() -> Any:
    """The message class of tf.train.Example, whose fields are public and fixed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="rayproj/example.proto", package="rayproj", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, kind in (("Bytes", kinds.TYPE_BYTES), ("Floats", kinds.TYPE_FLOAT), ("Ints", kinds.TYPE_INT64)):
        file.message_type.add(name=name).field.add(name="value", number=1, label=kinds.LABEL_REPEATED, type=kind)

    def add(message: Any, name: str, number: int, of: str, label: Any = kinds.LABEL_OPTIONAL) -> None:
        message.field.add(name=name, number=number, label=label, type=kinds.TYPE_MESSAGE, type_name=f".rayproj.{of}")

    feature = file.message_type.add(name="Feature")
    for number, name in enumerate(("Bytes", "Floats", "Ints"), 1):
        add(feature, name.lower(), number, name)
    entry = file.message_type.add(name="Entry")
    entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    # A map is a repeated message of key and value.
    add(file.message_type.add(name="Features"), "feature", 1, "Entry", kinds.LABEL_REPEATED)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("rayproj.Example"))


def parse(record: bytes) -> dict[str, list[Any]]:
    """The features of a record by name: bytes, floats or whole numbers."""
    example = _example().FromString(record)
    found = {}
    for entry in example.features.feature:
        kinds = (entry.value.bytes, entry.value.floats, entry.value.ints)
        found[entry.key] = next((list(kind.value) for kind in kinds if kind.value), [])
    return found


class PublishedImages:
    """The images of the published obfuscation benchmark, or of any set with its layout: the splits `<part>_<obfuscation>`
    of a folder of TFRecord files, those of each obfuscation in a row.

    Attributes:
        header: fields "image", "label", "image_id", "obfuscation" and "parameters" (JSON); a shard for each file.

    Raises:
        UserError: an obfuscation's files are not all there.
    """

    def __init__(self, folder: str, names: list[str], part: str = "validation") -> None:
        self.uri, splits = folder, dict[str, dict[int, Path]]()
        counts: dict[str, int] = {}
        for path in sorted(Path(folder).rglob("*.tfrecord-*")):
            if match := NAME.fullmatch(path.name):
                splits.setdefault(match["split"], {})[int(match["number"])] = path
                counts[match["split"]] = int(match["count"])
        there = [name for name in names if f"{part}_{name}" in splits]
        if not there:
            raise UserError(
                f"'{folder}' has no files such as obfuscated_imagenet-{part}_{names[0]}.tfrecord-00000-of-00005; unpack the "
                "published tars there."
            )
        for name in there:
            missing = set(range(counts[f"{part}_{name}"])) - splits[f"{part}_{name}"].keys()
            if missing:
                raise UserError(f"'{folder}' lacks file {min(missing)} of {part}_{name}; unpack its tar again.")
        files = [(k, path) for k, name in enumerate(there) for _, path in sorted(splits[f"{part}_{name}"].items())]
        self.files = [(k, path, places(path)) for k, path in files]
        sizes = tuple(len(found) for _, _, found in self.files)
        first = parse(_read(self.files[0][1], self.files[0][2][0]))
        fields = {
            "image": Field("jpg", decode_image(first["image"][0]).shape),
            "label": Field("int"),
            "image_id": Field("str"),
            "obfuscation": Field("int", values=tuple(there)),
            "parameters": Field("str"),
        }
        classes = tuple(f"ImageNet {k}" for k in range(1000))
        self.header = Header("obfuscated_imagenet", fields, sum(sizes), max(sizes), classes, sizes=sizes)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Reader.gather`."""
        indices = np.asarray(indices, np.int64)
        rows = list(self._rows(indices))
        image, label, name, obfuscation, parameters = zip(*rows, strict=True)
        return {
            "image": np.stack(image),
            "label": np.array(label, np.int64),
            "image_id": np.array(name, object),
            "obfuscation": np.array(obfuscation, np.int64),
            "parameters": np.array(parameters, object),
            "index": indices,
        }

    def _rows(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int, str, int, str]]:
        for shard, offset in zip(*self.header.places(indices), strict=True):
            number, path, found = self.files[shard]
            values = parse(_read(path, found[offset]))
            image, label, name = (values.pop(key) for key in ("image", "label", "file_name"))
            rest = {key: [v.decode() if isinstance(v, bytes) else v for v in value] for key, value in values.items()}
            yield decode_image(image[0]), label[0], name[0].decode(), number, json.dumps(rest, sort_keys=True)


def _read(path: Path, place: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])
