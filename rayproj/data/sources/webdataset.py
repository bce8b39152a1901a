"""Any webdataset tars: an image member and a label in a `cls` or `json` member. Nothing is ever unpickled."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayproj.data.reader import key_of
from rayproj.data.sources.base import Source, SourceConfig, decode
from rayproj.errors import UserError

IMAGES = ("png", "jpg", "jpeg", "webp")


def open(config: SourceConfig) -> Source:
    pattern = f"{config.path}/*.tar" if Path(config.path).is_dir() else config.path
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError(f"No tar matches '{pattern}'; give source.path a folder of tars or a glob.")
    labels = sorted({str(label) for _, _, label, _ in _walk(paths, config)}, key=lambda s: (len(s), s))
    name, data, _, _ = next(_walk(paths, config))
    channels = decode(data, name, config).shape[0]

    def rows() -> Iterator[dict[str, Any]]:
        for number, (name, data, label, values) in enumerate(_walk(paths, config)):
            image = decode(data, name, config)
            if image.shape[0] != channels:
                raise UserError(f"'{name}' has {image.shape[0]} channels, others have {channels}; set source.channels.")
            yield {
                "key": f"{number:08d}",
                "image": image,
                "label": labels.index(str(label)),
                "split": "train",
                "group": str(values[config.group_column]) if config.group_column else name,
                **{attribute: str(values[attribute]) for attribute in config.attributes},
            }

    return Source(Path(config.path).stem, tuple(labels), tuple(config.attributes), "", "", rows)


def _walk(paths: list[str], config: SourceConfig) -> Iterator[tuple[str, bytes, Any, dict[str, Any]]]:
    """(tar/key, encoded image, label, json values) of every sample."""
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                members: dict[str, bytes] = {}
                key = None
                for member in tar:
                    base, extension = key_of(member.name)
                    if key is not None and base != key:
                        yield _sample(f"{path}/{key}", members, config)
                        members = {}
                    key = base
                    file = tar.extractfile(member)
                    if file is not None:
                        members[extension.lower()] = file.read()
                if key is not None:
                    yield _sample(f"{path}/{key}", members, config)
        except tarfile.TarError as error:
            raise UserError(f"'{path}' is not a whole tar ({error}); fetch it again.") from error


def _sample(name: str, members: dict[str, bytes], config: SourceConfig) -> tuple[str, bytes, Any, dict[str, Any]]:
    image = next((d for ext, d in members.items() if ext.rpartition(".")[2] in IMAGES), None)
    if image is None:
        raise UserError(f"The sample '{name}' has no image member ({', '.join(IMAGES)}); take it out.")
    try:
        values = dict(json.loads(members["json"])) if "json" in members else {}
        label = values.get(config.label_column, members["cls"].decode().strip() if "cls" in members else None)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The json or cls member of the sample '{name}' cannot be read ({error}); repair it."
        ) from error
    if config.label_column not in values and "cls" not in members:
        raise UserError(
            f"The sample '{name}' has no label: neither '{config.label_column}' in a json member nor a cls member; name "
            "the key in source.label_column."
        )
    for needed in filter(None, [*config.attributes, config.group_column]):
        if needed not in values:
            raise UserError(
                f"The sample '{name}' has no '{needed}' in a json member; name keys that are there in source.attributes "
                "and source.group_column."
            )
    return name, image, label, values
