"""What all sources of image files with a table of them have in common: a description says what a line of the table is, and
the files are read when they are asked for, so that an import holds no more than a shard of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayproj.data.sources.base import Source, SourceConfig, decode
from rayproj.errors import UserError


class Table:
    """A CSV file with a line of column names.

    Raises:
        UserError: it is missing, empty or no such file, or lacks a column.
    """

    def __init__(self, path: Path, columns: Sequence[str], remedy: str) -> None:
        self.path = path
        try:
            first = next(self.lines(), None)
        except FileNotFoundError:
            raise UserError(f"There is no '{path}'; {remedy}.") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"'{path}' is no CSV file in UTF-8 ({error}); save it as one.") from error
        if first is None:
            raise UserError(f"'{path}' has no rows; it needs a header line and a line for each image.")
        self.columns = tuple(first[1])
        for column in columns:
            if column not in self.columns:
                raise UserError(f"'{path}' has no column '{column}'; it has {', '.join(self.columns)}.")

    def lines(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number of each line and its values by column; "" for what is missing."""
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            for values in reader:
                yield reader.line_num, values


@dataclass(frozen=True)
class Row:
    """What a line of a table says of an image."""

    path: str  # of its file
    label: int  # -1: not known
    split: str  # the part that the source puts it in, under the source's own name
    group: str  # what must not be torn apart
    attributes: dict[str, str]  # "": not known
    line: int
    table: str  # file name


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is read when it is called for.

    Raises:
        UserError: it cannot be read or decoded, or has other channels than the first of its source.
    """

    path: str
    line: int
    table: str
    config: SourceConfig
    channels: int

    def __call__(self) -> np.ndarray:
        image = decode(self._bytes(), Path(self.path).name, self.config)
        if self.channels and image.shape[0] != self.channels:
            raise UserError(
                f"'{self.path}' has {image.shape[0]} channels, others have {self.channels}; set source.channels."
            )
        return image

    def _bytes(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except OSError:
            raise UserError(
                f"'{self.path}' of line {self.line} of '{self.table}' cannot be read; put the file there or take the line "
                "out."
            ) from None


def source(
    config: SourceConfig,
    name: str,
    classes: tuple[str, ...],
    attributes: Sequence[str],
    rows: Callable[[], Iterator[Row]],
    roles: dict[str, str],
    licence: str = "",
    attribution: str = "",
) -> Source:
    """A source of rows.

    Args:
        attributes: those that the rows have; `config.attributes` are kept, all if it names none.
        rows: gives a fresh iterator of them.
        roles: name of a part of the source -> the part that it is in an import, "" for none; `config.roles` goes before it.

    Raises:
        UserError: an attribute or a part that the source does not have, or no row at all.
    """
    kept = tuple(config.attributes or attributes)
    if unknown := [attribute for attribute in kept if attribute not in attributes]:
        raise UserError(f"{name} has no attribute '{unknown[0]}'; it has {', '.join(attributes) or 'none'}.")
    if unknown := [part for part in config.roles if roles and part not in roles]:
        raise UserError(f"source.roles has '{unknown[0]}', and the parts of {name} are {', '.join(roles)}.")
    roles = {**roles, **config.roles}
    first = next(rows(), None)
    if first is None:
        raise UserError(f"{name} at '{config.path}' has no image that can be used.")
    channels = ImageFile(first.path, first.line, first.table, config, 0)().shape[0]

    def samples() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows()):
            if split := roles.get(row.split, row.split):
                yield {
                    "key": f"{number:08d}",
                    "image": ImageFile(row.path, row.line, row.table, config, channels),
                    "label": row.label,
                    "split": split,
                    "group": row.group,
                    **{attribute: row.attributes[attribute] for attribute in kept},
                }

    return Source(name, classes, kept, licence, attribution, samples)


def number(values: dict[str, str], column: str, line: int, table: str) -> float:
    """The value of a column; 0 if there is none.

    Raises:
        UserError: it is no number.
    """
    try:
        return float(values[column] or 0)
    except ValueError:
        raise UserError(
            f"'{values[column]}' of line {line} of '{table}' is no number for '{column}'; mend it."
        ) from None


def group_of(config: SourceConfig, attributes: dict[str, str], usual: str) -> str:
    """The value of the attribute that is the group; `usual` if the config names none.

    Raises:
        UserError: there is no such attribute.
    """
    if not config.group_column:
        return usual
    if config.group_column not in attributes:
        raise UserError(f"source.group_column='{config.group_column}' is none of {', '.join(attributes)}.")
    return attributes[config.group_column]
