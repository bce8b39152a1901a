"""A folder of images with a CSV of labels and attributes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayproj.data.sources.base import Source, SourceConfig, decode
from rayproj.errors import UserError


def open(config: SourceConfig) -> Source:
    folder = Path(config.path)
    listing = folder / config.csv
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"There is no '{listing}'; give source.path the folder and source.csv the file in it."
        ) from None
    table = list(csv.DictReader(text.splitlines()))
    if not table:
        raise UserError(f"'{listing}' has no rows; it needs a header line and a line for each image.")
    wanted = [config.file_column, config.label_column, *config.attributes]
    wanted += [c for c in (config.split_column, config.group_column) if c]
    for column in wanted:
        if column not in table[0]:
            raise UserError(f"'{listing}' has no column '{column}'; it has {', '.join(table[0])}.")
    classes = tuple(sorted({row[config.label_column] for row in table}))
    first = decode(_bytes(folder, table[0], config, 2), table[0][config.file_column], config)

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(table):
            name = row[config.file_column]
            image = decode(_bytes(folder, row, config, number + 2), name, config)
            if image.shape[0] != first.shape[0]:
                raise UserError(
                    f"'{name}' has {image.shape[0]} channels, others have {first.shape[0]}; set source.channels."
                )
            yield {
                "key": f"{number:08d}",
                "image": image,
                "label": classes.index(row[config.label_column]),
                "split": row[config.split_column] if config.split_column else "train",
                "group": row[config.group_column] if config.group_column else name,
                **{attribute: row[attribute] for attribute in config.attributes},
            }

    return Source(folder.name, classes, tuple(config.attributes), first.shape, "", "", rows)  # type: ignore[arg-type]


def _bytes(folder: Path, row: dict[str, str], config: SourceConfig, line: int) -> bytes:
    path = folder / row[config.file_column]
    try:
        return path.read_bytes()
    except OSError:
        raise UserError(
            f"'{path}' of line {line} of '{config.csv}' cannot be read; put the file there or take the line out."
        ) from None
