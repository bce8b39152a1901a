"""Pictures of datasets beside each other."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayproj import cli
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard


def write(uri: Path, side: int, colour: tuple[int, int, int], samples: int = 5) -> str:
    fields = {"image": Field("png", (3, side, side))}
    dataset = Dataset.create(str(uri), Header("plain", fields, samples, samples, ()))
    image = np.zeros((3, side, side), np.uint8) + np.array(colour, np.uint8)[:, None, None]
    commit_shard(dataset, 0, [{"key": f"{i:08d}", "image": image} for i in range(samples)], "test", 0.0)
    return str(uri)


def test_a_row_for_each_dataset_at_the_same_size(tmp_path: Path) -> None:
    small, large = write(tmp_path / "a", 4, (200, 0, 0)), write(tmp_path / "b", 8, (0, 0, 200))
    sheet = tmp_path / "sheet.png"
    assert cli.main(["dataset", "show", small, "--beside", large, "--sheet", str(sheet)]) == 0
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    red, blue = ((np.abs(pixels - colour).sum(2) < 30) for colour in ((200, 0, 0), (0, 0, 200)))
    assert red.sum() == pytest.approx(blue.sum(), rel=0.1) and red.sum() > 1000
    assert np.flatnonzero(red.any(1)).max() < np.flatnonzero(blue.any(1)).min() + 5, "the first above the second"


def test_images_without_a_label_have_a_row(tmp_path: Path) -> None:
    fields = {"image": Field("png", (3, 4, 4)), "label": Field("int")}
    for name, labels in (("some", (0, -1)), ("none", (-1, -1))):
        dataset = Dataset.create(str(tmp_path / name), Header("x", fields, 2, 2, ("a", "b")))
        colours = ((200, 0, 0), (0, 0, 200))
        rows = [
            {"key": str(k), "image": np.zeros((3, 4, 4), np.uint8) + np.array(c, np.uint8)[:, None, None], "label": of}
            for k, (c, of) in enumerate(zip(colours, labels, strict=True))
        ]
        commit_shard(dataset, 0, rows, "test", 0.0)
        sheet = tmp_path / f"{name}.png"
        assert cli.main(["dataset", "show", dataset.uri, "--sheet", str(sheet), "--per-class", "2"]) == 0
        pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
        assert all((np.abs(pixels - colour).sum(2) < 30).sum() > 200 for colour in colours)


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, other = write(tmp_path / "a", 4, (1, 1, 1)), write(tmp_path / "b", 6, (1, 1, 1))
    assert cli.main(["dataset", "show", small, "--beside", other, "--sheet", str(tmp_path / "s.png")]) == 2
    assert "sides that divide" in capsys.readouterr().err
