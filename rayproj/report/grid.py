"""A picture of a synthetic dataset: what was drawn under which condition."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.report import figures
from rayproj.synthesis.plan import Cells


def write_grid(uri: str, file: str, per_cell: int = 4) -> str:
    """Write a PNG of a row for each prompt, or class, and a column for each value of the properties.

    Args:
        per_cell: images of one row and column, at most.

    Raises:
        UserError: it is no synthetic dataset, or lacks an image of some row and column.
    """
    dataset = Dataset.open(uri)
    axes: dict[str, list[str]] = dict(dataset.header.provenance.get("axes", []))
    if not axes:
        raise UserError(f"'{uri}' is no dataset of jobs/generate.py with conditions; there is nothing to order it by.")
    *columns, rows = axes  # the prompt is the last axis, and a label alone is all there is
    cells: dict[tuple[int, ...], list[int]] = {}
    plan = Cells(axes, dataset.header.provenance.get("shares", []), dataset.header.num_samples)
    for sample in range(dataset.header.num_samples):
        cells.setdefault(tuple(plan.of(sample).values()), []).append(sample)
    wanted = list(itertools.product(*(range(len(axes[name])) for name in columns)))
    count = min(per_cell, min((len(cells.get((*c, r), [])) for c in wanted for r in range(len(axes[rows]))), default=0))
    if not count:
        cells_of_all = len(wanted) * len(axes[rows])
        raise UserError(
            f"'{uri}' has {dataset.header.num_samples} samples for {cells_of_all} cells; generate more of them."
        )
    reader = Reader(dataset, ["image"])

    def images(column: tuple[int, ...]) -> np.ndarray:
        """uint8 [rows, count, C, H, W]."""
        chosen = [cells[(*column, row)][:count] for row in range(len(axes[rows]))]
        return np.stack([reader.gather(np.array(ids))["image"] for ids in chosen])

    titles = [" ".join(axes[name][i] for name, i in zip(columns, c, strict=True)) for c in wanted]
    blocks = dict(zip(titles, map(images, wanted), strict=True))
    picture = figures.samples(blocks, axes[rows], zoom=0.5 if count > 1 else 0.9)
    Path(file).write_bytes(figures.png(picture))
    return file
