"""Cells of a dataset: its samples by label and attributes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError

UNKNOWN = "?"
AT_ONCE = 4096  # samples read at once


@dataclass(frozen=True)
class Cells:
    """Which cell each sample is in.

    Attributes:
        numbers: int64 [samples].
        names: of the cells, such as "cat × dark"; what is not known of a sample is "?".
    """

    numbers: np.ndarray
    names: tuple[str, ...]

    @property
    def counts(self) -> np.ndarray:
        """Samples of each cell."""
        return np.bincount(self.numbers, minlength=len(self.names))

    def inverse(self) -> np.ndarray:
        """fp32 [samples]: one over the number of samples of the cell, times a factor that makes the mean 1."""
        found = 1.0 / self.counts[self.numbers]
        return np.asarray(found / found.mean(), np.float32)


def cells_of(datasets: Sequence[Dataset], fields: Sequence[str], first: int | None = None) -> Cells:
    """The cells of the samples of several datasets in a row, or of the first ones of each, by these fields together, in the
    order of their names.

    Raises:
        UserError: a dataset has no such field.
    """
    texts = [text for dataset in datasets for text in _texts(dataset, list(fields), first)]
    names, numbers = np.unique(texts, return_inverse=True)
    return Cells(numbers.astype(np.int64), tuple(map(str, names)))


def _texts(dataset: Dataset, fields: list[str], first: int | None) -> list[str]:
    header = dataset.header
    if missing := [name for name in fields if name not in header.fields or header.fields[name].array]:
        there = ", ".join(name for name, field in header.fields.items() if not field.array)
        raise UserError(f"{dataset.uri} has no attribute '{missing[0]}'; it has {there}.")
    reader, found = Reader(dataset, fields=fields), list[str]()
    total = header.num_samples if first is None else min(first, header.num_samples)
    for begin in range(0, total, AT_ONCE):
        columns = reader.gather(np.arange(begin, min(begin + AT_ONCE, total)))
        parts = [[text or UNKNOWN for text in texts_of(columns[name], header.values_of(name))] for name in fields]
        found += [" × ".join(row) for row in zip(*parts, strict=True)]
    return found


def texts_of(column: np.ndarray, values: Sequence[str]) -> list[str]:
    """What a column of a field with these values says of each sample; "" where that is not known."""
    if column.dtype == object:
        return list(map(str, column))
    if np.issubdtype(column.dtype, np.floating):
        return ["" if n != n else str(n) for n in column.tolist()]
    return ["" if n < 0 else values[n] if values else str(n) for n in column.tolist()]
