"""Nothing is in two parts of a split that must be in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.leaks import Leaks, crossing, fingerprints
from rayproj.data.reader import Reader
from rayproj.data.sources import SourceConfig, SourceKind
from rayproj.errors import UserError

Write = Callable[..., SourceConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Images with a part and a patient each; of equal numbers they are the same."""

    def of(rows: list[tuple[int, str, str]]) -> SourceConfig:
        lines = ["file,label,part,patient"]
        for k, (number, part, patient) in enumerate(rows):
            noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            # The same pixels in files that differ.
            Image.fromarray(noise).save(tmp_path / f"{k}.png", compress_level=k % 10)
            lines.append(f"{k}.png,{'ab'[k % 2]},{part},{patient}")
        (tmp_path / "labels.csv").write_text("\n".join(lines))
        return SourceConfig(
            kind=SourceKind.image_folder,
            path=str(tmp_path),
            image_size=8,
            split_column="part",
            group_column="patient",
            attributes=["patient"],
        )

    return of


def imported(source: SourceConfig, out: Path, **more: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    result = import_dataset(ImportConfig(source=source, out=str(out), **more), lambda event: None)
    parts = {}
    for part in result["parts"]:
        dataset = Dataset.open(f"{out}/{part}")
        parts[part] = Reader(dataset, ["patient"]).gather(np.arange(dataset.header.num_samples))["patient"].tolist()
    return result, parts


def test_what_crosses_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    names = ["ood_test", "train", "extra", "id_val", "unlabelled", "other", "id_test"]
    parts = {name: rng.integers(0, 60, 20).tolist() for name in names}
    ordered = ["train", "unlabelled", "extra", "other", "id_val", "id_test", "ood_test"]
    side = {"unlabelled": "train"}
    expected = set()
    for part in names:
        for index, key in enumerate(parts[part]):
            # Only the first part that has a key counts: who came later has lost it already.
            owner = next(name for name in ordered if key in parts[name])
            if side.get(owner, owner) != side.get(part, part):
                expected.add((part, index, owner))
    assert set(crossing(parts)) == expected and len(expected) > 20


@pytest.mark.parametrize("seed", range(6))
def test_no_group_is_in_two_parts_of_a_split_by_fractions(write: Write, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = write([(k, "train", f"p{rng.integers(50)}") for k in range(120)])
    fractions = dict(zip(("train", "unlabelled", "id_val", "id_test"), rng.dirichlet([9] * 4).tolist(), strict=True))
    result, parts = imported(source, tmp_path / "out", fractions=fractions, seed=seed)
    patients = [set(found) for found in parts.values()]
    assert sum(map(len, patients)) == len(set().union(*patients)) and result["samples"] == 120
    assert result["left_out"] == {"without a label": {}, "groups in two parts": {}, "images in two parts": {}}


ROWS = [(1, "train", "p1"), (2, "train", "p2"), (3, "test", "p2"), (4, "test", "p3"), (5, "test", "p4")]


def test_a_group_in_two_parts(write: Write, tmp_path: Path) -> None:
    source = write(ROWS)
    with pytest.raises(UserError, match=r"The group 'p2' is in the parts 'train' and 'test'; .* by data.leaks=drop"):
        imported(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    result, parts = imported(source, tmp_path / "dropped", leaks=Leaks.drop)
    assert result["left_out"]["groups in two parts"] == {"test": 1} and sorted(parts["test"]) == ["p3", "p4"]
    assert sorted(parts["train"]) == ["p1", "p2"]
    result, parts = imported(source, tmp_path / "allowed", leaks=Leaks.allow)
    assert len(parts["test"]) == 3 and not result["left_out"]["groups in two parts"]
    with pytest.raises(UserError, match="All of the part 'test' is in other parts too"):
        imported(write([(1, "train", "p1"), (2, "test", "p1")]), tmp_path / "all", leaks=Leaks.drop)


def test_the_same_image_in_two_parts(write: Write, tmp_path: Path) -> None:
    source = write([*ROWS[:2], (1, "test", "p9"), *ROWS[3:], (5, "test", "p4")])
    with pytest.raises(UserError, match=r"The image '.*/2\.png' is in the parts 'train' and 'test'"):
        imported(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    result, parts = imported(source, tmp_path / "dropped", leaks=Leaks.drop)
    assert result["left_out"]["images in two parts"] == {"test": 1}
    assert sorted(parts["test"]) == ["p3", "p4", "p4"], "the same image twice in one part is nobody's leak"


def test_fingerprints_tell_shapes_apart() -> None:
    shapes = [(1, 2, 8), (1, 4, 4), (1, 8, 2), (2, 2, 4)]
    samples = [{"key": "", "group": "", "image": np.zeros(shape, np.uint8)} for shape in [*shapes, shapes[0]]]
    found = fingerprints(samples)
    assert len(set(found)) == 4 and found[0] == found[-1]
