"""Obfuscated datasets: what is written, that it comes again from its parameters, and images of ImageNet's folders."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.imagenet import ImageFolders
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.obfuscation import CLEAN, Assets, AssetsConfig, regenerate
from rayproj.obfuscation.writing import WriteConfig, Writer, header_of

NAMES = ["Halftoning", "PhotoComposition", "SwirlWarp"]


def write_images(uri: str, size: int = 22) -> Dataset:
    fields = {"image": Field("png", (3, 16, 16)), "label": Field("int"), "tone": Field("str")}
    dataset = Dataset.create(uri, Header("pictures", fields, size, 8, ("a", "b")))
    rng = np.random.default_rng(0)
    for shard in range(dataset.header.num_shards):
        samples = [
            {
                "key": f"{i:08d}",
                "image": rng.integers(0, 256, (3, 16, 16)).astype(np.uint8),
                "label": i % 2,
                "tone": f"t{i % 3}",
            }
            for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.0)
    return dataset


def obfuscated(config: WriteConfig, seed: int = 5) -> Dataset:
    """What jobs/obfuscate.py writes, in any order."""
    dataset = Dataset.create(config.out, header_of(config, seed))
    writer = Writer({"config": asdict(config), "out": dataset.uri}, "cpu")
    for shard in reversed(range(dataset.header.num_shards)):
        commit_shard(dataset, shard, writer.make(shard), "test", 0.0)
    return dataset


def test_every_image_is_there_under_every_obfuscation_and_comes_again(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    assets = AssetsConfig(photos=source.uri, count=7)
    config = WriteConfig(source.uri, f"{tmp_path}/out", NAMES, assets=assets, shard_size=9, batch=4)
    dataset = obfuscated(config)
    assert dataset.header.num_samples == 4 * 22 and dataset.header.fields["obfuscation"].values == (CLEAN, *NAMES)
    columns, images = Reader(dataset).gather(np.arange(88)), Reader(source).gather(np.arange(22))
    for number, name in enumerate([CLEAN, *NAMES]):
        here = columns["obfuscation"] == number
        assert columns["image_id"][here].tolist() == [f"{i:08d}" for i in range(22)]
        assert np.array_equal(columns["label"][here], images["label"]) and list(columns["tone"][here]) == list(
            images["tone"]
        )
        records = [json.loads(text) for text in columns["parameters"][here]]
        expected = images["image"]
        if name != CLEAN:
            expected = regenerate(name, torch.from_numpy(images["image"]), records, Assets.load(assets)).numpy()
        assert np.array_equal(columns["image"][here], expected), "from what is stored alone"
    again = obfuscated(replace(config, out=f"{tmp_path}/again", batch=100))
    assert [r.sha256 for r in again.records().values()] == [r.sha256 for r in dataset.records().values()]
    said = dataset.header.provenance
    assert said["manifest"] == source.manifest_hash() and "not the benchmark's own" in said["notice"]
    assert said["obfuscations"]["SwirlWarp"]["strength"]["low"] == 3 and said["assets"]["count"] == 7


def test_what_a_model_promised_of_private_images_goes_along(tmp_path: Path) -> None:
    write_images(f"{tmp_path}/images")
    config = WriteConfig(f"{tmp_path}/images", f"{tmp_path}/out", ["RotateImage"])
    assert "private" not in header_of(config, 0).provenance
    said = tmp_path / "images" / "dataset.json"
    said.write_text(
        json.dumps({**json.loads(said.read_text()), "provenance": {"private": {"epsilon": 8.0}, "seed": 1}})
    )
    found = header_of(config, 0).provenance
    assert found["private"] == {"epsilon": 8.0} and found["seed"] == 0


def test_several_draws_of_the_first_images(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    config = WriteConfig(
        source.uri, f"{tmp_path}/out", ["RotateImage"], clean=False, samples=3, draws=4, encoding="jpg"
    )
    columns = Reader(obfuscated(config)).gather(np.arange(12))
    assert columns["image_id"].tolist() == [f"{i:08d}#{k}" for i in range(3) for k in range(4)]
    assert len({json.loads(text)["angle"] for text in columns["parameters"]}) == 12


def test_images_of_one_severity(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    for severity, (low, high) in {1: (0.08, 0.144), 5: (0.336, 0.4)}.items():
        dataset = obfuscated(
            WriteConfig(source.uri, f"{tmp_path}/{severity}", ["LineShift"], clean=False, severity=severity)
        )
        shifts = [json.loads(text)["shift"] for text in Reader(dataset).gather(np.arange(22))["parameters"]]
        assert low - 1e-6 <= min(shifts) and max(shifts) <= high + 1e-6
        assert dataset.header.provenance["severity"] == severity
    assert "severity is 1 to 5" in WriteConfig(severity=6).problems()[0]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    with pytest.raises(UserError, match="AdversarialPatches needs patches"):
        header_of(WriteConfig(source.uri, f"{tmp_path}/out", ["AdversarialPatches"]), 0)
    with pytest.raises(UserError, match="is no finished run of jobs"):
        header_of(WriteConfig(source.uri, f"{tmp_path}/out", assets=AssetsConfig(learned=f"{tmp_path}/run")), 0)
    assert len(header_of(WriteConfig(source.uri, f"{tmp_path}/out"), 0).fields["obfuscation"].values) == 1 + 19, (
        "without 3"
    )
    assert WriteConfig(encoding="gif", draws=0).problems()


def write_folders(root: Path, names: list[str]) -> None:
    rng = np.random.default_rng(1)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(2):
            picture = Image.fromarray(rng.integers(0, 256, (64, 80), dtype=np.uint8)).resize((80 + number, 64))
            picture.convert("RGB" if k else "L").save(root / name / f"{name}_{k}.JPEG")


def test_images_of_class_folders_are_cut_at_the_middle(tmp_path: Path) -> None:
    names = ["n01440764", "n01443537", "n02119789"]
    write_folders(tmp_path / "val", names)
    images = ImageFolders(str(tmp_path / "val"), size=28)
    assert images.header.num_samples == 6 and images.header.classes == tuple(names)
    columns = images.gather(np.array([5, 0]))
    assert columns["label"].tolist() == [2, 0] and columns["image_id"][1] == "n01440764/n01440764_0.JPEG"
    picture = np.asarray(Image.open(tmp_path / "val" / "n01440764" / "n01440764_0.JPEG").convert("RGB")).astype(float)
    # 7/8 of 64 is 56 pixels, of which each pixel of 28 is about the mean of two by two.
    means = picture[4:60, 12:68].reshape(28, 2, 28, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(columns["image"][1] - means).mean() < 12 and columns["image"].shape == (2, 3, 28, 28)
    config = WriteConfig(str(tmp_path / "val"), f"{tmp_path}/out", ["LineShift"], size=28)
    found = Reader(obfuscated(config)).gather(np.arange(12))
    assert found["image_id"].tolist()[:6] == images.files
    (tmp_path / "val" / names[0] / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken.jpg' cannot be read"):
        ImageFolders(str(tmp_path / "val")).gather(np.arange(3))
    with pytest.raises(UserError, match="no folders such as n01440764"):
        ImageFolders(str(tmp_path / "nowhere"))


def test_a_thousand_folders_are_imagenets_classes(tmp_path: Path) -> None:
    for k in range(1000):
        (tmp_path / f"n{k:08d}").mkdir()
    write_folders(tmp_path / "one", ["n00000000"])
    (tmp_path / "one" / "n00000000" / "n00000000_0.JPEG").rename(tmp_path / "n00000123" / "x.JPEG")
    images = ImageFolders(str(tmp_path))
    assert images.header.classes[7] == "ImageNet 7" and images.labels.tolist() == [123]
