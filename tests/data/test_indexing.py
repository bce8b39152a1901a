"""Tars that others wrote, by webdataset itself and broken by hand, read where they lie."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from rayproj import cli
from rayproj.data.dataset import Dataset
from rayproj.data.indexing import index
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from tests.support import images

NAMES = ("cat", "dog", "owl")


def sample(k: int) -> dict[str, Any]:
    rng = np.random.default_rng(k)
    values = {"__key__": f"dir.v1/s{k:03d}", "png": rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)}
    return {**values, "cls": NAMES[k % 3].encode(), "txt": f"number {k}", "json": {"site": k % 2, "score": k / 2}}


def write(folder: Path, sizes: tuple[int, ...] = (5, 2, 4)) -> None:
    k = 0
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for _ in range(size):
                writer.write(sample(k))
                k += 1


def test_tars_of_different_sizes_are_one_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert cli.main(["dataset", "index", str(tmp_path)]) == 0
    assert "11 samples in 3 tars, of " in capsys.readouterr().out
    dataset = Dataset.open(str(tmp_path))
    assert dataset.complete and dataset.header.classes == NAMES and dataset.header.sizes == (5, 2, 4)
    order = np.array([10, 0, 5, 4, 6, 7])
    found = Reader(dataset).gather(order)
    theirs = webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False, empty_check=False)
    decoded = list(theirs)
    for k, i in enumerate(order):
        expected = decoded[i]
        assert np.array_equal(
            np.moveaxis(found["image"][k], 0, -1), np.asarray(Image.open(io.BytesIO(expected["png"])))
        )
        assert found["caption"][k] == expected["txt"].decode() and NAMES[found["label"][k]] == expected["cls"].decode()
        assert (found["site"][k], found["score"][k]) == (i % 2, i / 2)
    assert np.array_equal(Reader(dataset, ["image"]).gather(order)["image"], found["image"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert sum(sum(r.class_counts.values()) for r in dataset.records().values()) == 11
    assert index(str(tmp_path))["samples"] == 11, "again, it is there"
    sheet = str(tmp_path / "sheet.png")
    assert cli.main(["dataset", "show", str(tmp_path), "--sheet", sheet, "--per-class", "3"]) == 0
    said = capsys.readouterr().out
    assert "11 samples in 3 shards" in said and "classes: cat 4, dog 4, owl 3" in said
    assert "caption: 11 different" in said or "caption: number 0 1" in said
    assert np.asarray(Image.open(sheet)).std() > 20


def test_classes_of_a_json(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for k in range(4):
            writer.write({"__key__": str(k), "x.npy": np.full((2,), k, np.float32), "json": {"kind": k + 3}})
    index(str(tmp_path), label="kind")
    dataset = Dataset.open(str(tmp_path))
    found = Reader(dataset).gather(np.arange(4))
    assert found["x"][:, 0].tolist() == [0, 1, 2, 3]
    assert dataset.header.fields["label"].encoding == "int" and dataset.header.classes[-1] == "6"


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The tar with other contents; None leaves a member out."""
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            data = change(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("it was unpickled",))


def larger(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((9, 9)).save(buffer, "png")
    return buffer.getvalue()


BROKEN: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "does not decode": (lambda name, data: data[:40] if name.endswith("s001.png") else data, "does not decode: png"),
    "missing member": (lambda name, data: None if name.endswith("s001.cls") else data, "missing member: cls"),
    "missing key": (lambda name, data: b'{"site": 1}' if name.endswith("s001.json") else data, "missing key: score"),
    "another shape": (
        lambda name, data: larger(data) if name.endswith("s001.png") else data,
        "png is 3x9x9, most are 3x8x6",
    ),
}


@pytest.mark.parametrize("what", [*BROKEN, "torn tar"])
def test_what_is_broken_is_named_and_counted_and_skipped_only_if_told(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    first = tmp_path / "part-0.tar"
    if what == "torn tar":
        first.write_bytes(first.read_bytes()[: 512 * 13 + 100])
        says = "torn tar"
    else:
        change, says = BROKEN[what]
        rewritten(first, change)
    assert cli.main(["dataset", "index", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "dataset.json").exists()
    found = index(str(tmp_path), skip=True)
    left = 6 if what == "torn tar" else 10
    assert found["samples"] == left and found["left_out"] == {what: 1}
    dataset = Dataset.open(str(tmp_path))
    kept = [k for k in range(11) if (k >= 5 if what == "torn tar" else k != 1)]
    assert list(Reader(dataset, ["caption"]).gather(np.arange(left))["caption"]) == [f"number {k}" for k in kept]
    assert cli.main(["dataset", "show", str(tmp_path)]) == 0
    assert "left out as broken: 1" in capsys.readouterr().out


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for k in range(2):
            writer.write({**sample(k), "extra.pyd": pickle.dumps(Bomb()), "more.pickle": pickle.dumps(Bomb())})
    index(str(tmp_path))
    assert len(Reader(Dataset.open(str(tmp_path))).gather(np.arange(2))["image"]) == 2


def test_a_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no tar in"):
        index(str(tmp_path))
    images.write(str(tmp_path / "one"))
    with pytest.raises(UserError, match="holds datasets already, such as one"):
        index(str(tmp_path))
