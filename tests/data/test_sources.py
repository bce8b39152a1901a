"""Sources and the import: exact counts, no leaks, and one clear sentence for whatever is wrong."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.data.embedded.make import write_idx
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.reader import Reader
from rayproj.data.sources import SourceConfig, SourceKind, open_source
from rayproj.data.split import assign
from rayproj.errors import UserError


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["file,label,patient,site"]
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes(png(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)))
        lines.append(f"{i}.png,{'cat' if i % 2 else 'dog'},p{i // 3},{i % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_the_embedded_fashion_mnist_is_balanced_and_padded() -> None:
    source = open_source(SourceConfig(kind=SourceKind.fashion_mnist, image_size=32))
    samples = list(source.samples())
    labels = {split: [s["label"] for s in samples if s["split"] == split] for split in ("train", "test")}
    assert np.array_equal(np.bincount(labels["train"]), [1000] * 10)
    assert np.array_equal(np.bincount(labels["test"]), [200] * 10)
    images = np.stack([s["image"] for s in samples[:100]])
    assert images.shape == (100, 1, 32, 32) and images.dtype == np.uint8
    assert images[:, :, :2].max() == 0 and images[:, :, 2:30, 2:30].max() > 200


def test_the_embedded_emoji_are_complete_and_split_by_role(tmp_path: Path) -> None:
    source = open_source(SourceConfig(kind=SourceKind.emoji, label_column="gender"))
    samples = list(source.samples())
    assert len(samples) == 13488 and source.classes == ("female", "male", "mixed", "unspecified")
    assert all(s["image"].shape == (3, 32, 32) for s in samples[::500])
    assert samples[0]["image"][:, 0, 0].tolist() == [255, 255, 255]
    parts: dict[str, set[str]] = {"a": set(), "b": set()}
    for s in samples:
        parts[assign(s["group"], {"a": 0.7, "b": 0.3}, 0)].add(s["role"])
    assert not parts["a"] & parts["b"]
    assert 0.6 < len(parts["a"]) / (len(parts["a"]) + len(parts["b"])) < 0.8


def test_shares_of_a_split_come_out_and_depend_on_the_key_alone() -> None:
    fractions = {"x": 0.2, "y": 0.3, "z": 0.5}
    parts = [assign(str(i), fractions, 0) for i in range(20000)]
    for part, share in fractions.items():
        assert abs(parts.count(part) / 20000 - share) < 4 * (share * (1 - share) / 20000) ** 0.5
    assert parts[7] == assign("7", fractions, 0)
    assert parts != [assign(str(i), fractions, 1) for i in range(20000)]


def test_a_folder_with_a_csv(folder: Path) -> None:
    config = SourceConfig(
        kind=SourceKind.image_folder, path=str(folder), image_size=16, group_column="patient", attributes=["site"]
    )
    out = ImportConfig(source=config, out=str(folder / "out"), fractions={"a": 0.5, "b": 0.5}, shard_size=5)
    result = import_dataset(out, lambda event: None)
    assert result["samples"] == 24
    notes = {}
    for part in ("a", "b"):
        dataset = Dataset.open(str(folder / "out" / part))
        assert dataset.complete and dataset.header.classes == ("cat", "dog")
        found = Reader(dataset).gather(np.arange(dataset.header.num_samples))
        assert found["image"].shape[1:] == (3, 16, 16)
        assert all((site == "1") == (label == 0) for site, label in zip(found["site"], found["label"], strict=True))
        notes[part] = dataset.manifest_hash()
    assert import_dataset(out, lambda event: None)["parts"] == result["parts"]
    assert {p: Dataset.open(str(folder / "out" / p)).manifest_hash() for p in notes} == notes


def test_buckets_are_for_files(folder: Path) -> None:
    assert SourceConfig(kind=SourceKind.image_folder, buckets=[[16, 24]]).problems() == []
    assert "other sources have squares" in SourceConfig(buckets=[[16, 24]]).problems()[0]
    assert "both positive" in SourceConfig(kind=SourceKind.webdataset, buckets=[[16]]).problems()[0]


def test_patients_are_never_torn_apart(folder: Path) -> None:
    config = SourceConfig(
        kind=SourceKind.image_folder, path=str(folder), group_column="patient", attributes=["patient"]
    )
    import_dataset(ImportConfig(source=config, out=str(folder / "out"), fractions={"a": 0.5, "b": 0.5}), lambda e: None)
    patients = []
    for part in ("a", "b"):
        dataset = Dataset.open(str(folder / "out" / part))
        patients.append(set(Reader(dataset, ["patient"]).gather(np.arange(dataset.header.num_samples))["patient"]))
    assert patients[0] and patients[1] and not patients[0] & patients[1]


def test_a_part_of_some_classes_alone(folder: Path) -> None:
    config = SourceConfig(kind=SourceKind.image_folder, path=str(folder), image_size=16)
    out = ImportConfig(source=config, out=str(folder / "out"), fractions={"a": 0.5, "b": 0.5}, classes={"a": ["dog"]})
    parts = import_dataset(out, lambda event: None)["parts"]
    assert parts["a"]["class_counts"].keys() == {"dog"} and parts["b"]["class_counts"].keys() == {"cat", "dog"}
    for part in ("a", "b"):
        dataset = Dataset.open(str(folder / "out" / part))
        assert dataset.header.classes == ("cat", "dog"), "labels mean the same in both"
        assert set(Reader(dataset).gather(np.arange(dataset.header.num_samples))["label"]) <= {0, 1}
    with pytest.raises(UserError, match=r"has 'cow', and the source has cat, dog"):
        import_dataset(replace(out, classes={"a": ["cow"]}), lambda event: None)
    with pytest.raises(UserError, match=r"no such part: there are a, b"):
        import_dataset(replace(out, classes={"c": ["dog"]}), lambda event: None)


def spoil_image(folder: Path) -> None:
    (folder / "7.png").write_bytes(b"not an image")


def remove_image(folder: Path) -> None:
    (folder / "7.png").unlink()


def remove_listing(folder: Path) -> None:
    (folder / "labels.csv").unlink()


@pytest.mark.parametrize(
    ("spoil", "change", "says"),
    [
        (spoil_image, {}, r"'7\.png' cannot be decoded"),
        (remove_image, {}, r"7\.png' of line 9 of 'labels\.csv' cannot be read"),
        (remove_listing, {}, "There is no '.*labels.csv'"),
        (None, {"label_column": "kind"}, "has no column 'kind'; it has file, label, patient, site"),
    ],
)
def test_a_bad_folder_is_named(folder: Path, spoil, change, says: str) -> None:  # type: ignore[no-untyped-def]
    if spoil:
        spoil(folder)
    with pytest.raises(UserError, match=says):
        list(open_source(SourceConfig(kind=SourceKind.image_folder, path=str(folder), **change)).samples())


def test_the_tone_of_an_image_is_that_of_what_it_shows() -> None:
    config = SourceConfig(kind=SourceKind.fashion_mnist, image_size=32, attributes=["tone"])
    source = open_source(config)
    assert source.attributes == ("tone",)
    for row, _ in zip(source.rows(), range(50), strict=False):
        shown = [value for value in row["image"].ravel().tolist() if value]
        assert row["tone"] == ("light" if sum(shown) / len(shown) >= 128 else "dark"), row["key"]
    with pytest.raises(UserError, match=r"'style' is nothing that .* has; there is tone"):
        open_source(replace(config, attributes=["style"]))


def test_any_idx_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count))
    config = SourceConfig(kind=SourceKind.idx, path=str(tmp_path), image_size=28)
    assert [s["label"] for s in open_source(config).samples()] == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    with pytest.raises(UserError, match="give at least 28"):
        open_source(SourceConfig(kind=SourceKind.idx, path=str(tmp_path), image_size=16))
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"t10k-labels.* cannot be read"):
        open_source(config)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        open_source(SourceConfig(kind=SourceKind.idx, path=str(tmp_path / "none")))


def test_any_webdataset_tars(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(3):
                image = png(rng.integers(0, 256, (9, 9), dtype=np.uint8))
                for name, data in ((f"{shard}{i}.png", image), (f"{shard}{i}.cls", str(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    source = open_source(SourceConfig(kind=SourceKind.webdataset, path=str(tmp_path), image_size=8))
    samples = list(source.samples())
    assert [s["label"] for s in samples] == [0, 1, 2, 0, 1, 2] and {s["image"].shape for s in samples} == {(1, 8, 8)}
    for missing in ({"attributes": ["site"]}, {"group_column": "site"}):
        with pytest.raises(UserError, match="has no 'site' in a json member"):
            open_source(SourceConfig(kind=SourceKind.webdataset, path=str(tmp_path), **missing))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="No tar matches"):
        open_source(SourceConfig(kind=SourceKind.webdataset, path=str(tmp_path / "none")))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"1\.tar' is not a whole tar"):
        open_source(SourceConfig(kind=SourceKind.webdataset, path=str(tmp_path)))


@pytest.mark.parametrize(
    ("member", "data", "says"),
    [
        ("json", b'{"label": 1}', "has no label: neither 'class' in a json member nor a cls member; name the key"),
        ("txt", b"a cat", "has no label: neither 'class' in a json member"),
        ("json", b'{"class"', "The json or cls member of the sample '.*1' cannot be read"),
        ("json", b"[1]", "The json or cls member of the sample '.*1' cannot be read"),
        ("cls", b"\xff", "The json or cls member of the sample '.*1' cannot be read"),
    ],
)
def test_a_webdataset_without_a_label(tmp_path: Path, member: str, data: bytes, says: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("1.png", png(np.zeros((9, 9), np.uint8))), (f"1.{member}", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=says):
        open_source(SourceConfig(kind=SourceKind.webdataset, path=str(tmp_path), label_column="class"))


def test_an_unknown_attribute_of_the_emoji() -> None:
    with pytest.raises(UserError, match="no attribute 'colour'"):
        open_source(SourceConfig(kind=SourceKind.emoji, attributes=["colour"]))
