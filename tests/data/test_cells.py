"""Samples by label and attributes, against a loop."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rayproj.data.cells import cells_of
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError

TONES = ["dark", "light", ""]


def write(uri: str, samples: int, start: int) -> Dataset:
    fields = {"label": Field("int"), "tone": Field("str"), "style": Field("int", values=("flat", "bold"))}
    dataset = Dataset.create(uri, Header("cells", fields, samples, 4, ("cat", "dog")))
    for shard in range(dataset.header.num_shards):
        rows = [{"key": f"{i:08d}", **row(i + start)} for i in dataset.header.shard_range(shard)]
        commit_shard(dataset, shard, rows, "test", 0.0)
    return dataset


def row(i: int) -> dict[str, object]:
    return {"label": i % 2, "tone": TONES[i % 3], "style": i % 4 - 1 if i % 4 < 3 else 1}


def name(i: int) -> str:
    said = row(i)
    style = {-1: "?", 0: "flat", 1: "bold"}[int(said["style"])]  # type: ignore[call-overload]
    return f"{('cat', 'dog')[i % 2]} × {said['tone'] or '?'} × {style}"


def test_cells_of_two_datasets_in_a_row(tmp_path: Path) -> None:
    datasets = [write(str(tmp_path / "a"), 10, 0), write(str(tmp_path / "b"), 7, 10)]
    found = cells_of(datasets, ["label", "tone", "style"])
    assert [found.names[n] for n in found.numbers] == [name(i) for i in range(17)]
    assert dict(zip(found.names, found.counts.tolist(), strict=True)) == Counter(map(name, range(17)))
    weights = found.inverse()
    assert weights.mean() == pytest.approx(1)
    totals = [weights[found.numbers == n].sum() for n in range(len(found.names))]
    assert np.allclose(totals, totals[0])


def test_an_attribute_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no attribute 'age'; it has label, tone, style"):
        cells_of([write(str(tmp_path / "a"), 4, 0)], ["label", "age"])
