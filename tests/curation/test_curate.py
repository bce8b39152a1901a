"""Curation against planted faults: every sample that is left out is listed with its reasons, counts add up, planted copies
are one cluster, and drawing follows the weights."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from rayproj.curation.curate import CurateConfig, DuplicatesConfig, curate
from rayproj.curation.duplicates import clusters, difference_hash, weights
from rayproj.curation.scorers import RuleConfig, Scorer, file_of, resized, scorer
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.order import Weighted
from rayproj.data.reader import Reader
from rayproj.data.sources import SourceConfig, SourceKind, open_source
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.responsibility.personal import personal
from rayproj.responsibility.safety import Safety, SafetyConfig, described, planned

CAPTIONS = {3: "call 0171 555 0123", 7: "by jane.doe@example.org", 8: "A Gun, drawn"}


@pytest.fixture(scope="module")
def pictures() -> list[dict[str, Any]]:
    """30 emoji that look different, of all styles."""
    config = SourceConfig(kind=SourceKind.emoji, image_size=32, attributes=["caption", "style"])
    samples = list(open_source(config).samples())
    return samples[:: len(samples) // 30][:30]


@pytest.fixture
def images(pictures: list[dict[str, Any]], tmp_path: Path) -> str:
    """They, with planted faults: 5 is blurred, 6 is empty, three captions are bad, 9 comes as four more jpegs and crops."""
    samples = []
    for i, one in enumerate(pictures):
        image = one["image"]
        if i == 5:
            small = Image.fromarray(np.moveaxis(image, 0, -1)).resize((4, 4)).resize((32, 32), Image.Resampling.BICUBIC)
            image = np.moveaxis(np.asarray(small), -1, 0)
        image = np.full_like(image, 255) if i == 6 else image
        samples.append({"image": image, "caption": CAPTIONS.get(i, one["caption"]), "style": one["style"]})
    for quality, crop in ((95, 0), (70, 0), (90, 1), (80, 1)):
        picture = Image.fromarray(np.moveaxis(samples[9]["image"], 0, -1))
        picture = picture.crop((crop, crop, 32 - crop, 32 - crop)).resize((32, 32), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=quality)
        samples.append({**samples[9], "image": np.moveaxis(np.asarray(Image.open(buffer)), -1, 0)})
    fields = {"image": Field("png", (3, 32, 32)), "label": Field("int"), "caption": Field("str"), "style": Field("str")}
    dataset = Dataset.create(str(tmp_path / "images"), Header("planted", fields, len(samples), 10, ("a",)))
    for shard in range(dataset.header.num_shards):
        span = dataset.header.shard_range(shard)
        commit_shard(dataset, shard, [{"key": f"{i}", "label": 0, **samples[i]} for i in span], "test", 0.0)
    return dataset.uri


def config(images: str, tmp_path: Path, **changes: Any) -> CurateConfig:
    rules = {
        "blurred": RuleConfig(Scorer.sharpness, at_least=200.0),
        "flat": RuleConfig(Scorer.contrast, at_least=5.0),
        "personal": RuleConfig(Scorer.pii, at_most=0.0),
        "unsafe": RuleConfig(Scorer.blocked, at_most=0.0, words=["gun", "knife"]),
    }
    values = {"images": images, "out": str(tmp_path / "out"), "rules": rules, "batch": 7, **changes}
    return CurateConfig(**values)


def test_what_is_left_out_is_listed_and_counts_add_up(images: str, tmp_path: Path) -> None:
    result = curate(config(images, tmp_path), lambda event: None)
    assert result["samples"] == 34 == result["kept"] + result["rejected"]
    assert result["reasons"] == {"blurred": 2, "flat": 1, "personal": 2, "unsafe": 1}
    dataset = Dataset.open(str(tmp_path / "out"))
    listed = [json.loads(line) for line in dataset.store.read("rejected.jsonl").splitlines()]
    assert {line["index"]: sorted(line["reasons"]) for line in listed} == {
        3: ["personal"], 5: ["blurred"], 6: ["blurred", "flat"], 7: ["personal"], 8: ["unsafe"],
    }  # fmt: skip
    assert dataset.complete and dataset.header.num_samples == 29
    captions = Reader(dataset).gather(np.arange(29))["caption"]
    assert not set(captions) & set(CAPTIONS.values())
    before = dataset.manifest_hash()
    assert curate(config(images, tmp_path), lambda event: None) == result, "again it finds what is there"
    assert Dataset.open(dataset.uri).manifest_hash() == before


def test_what_stays_is_counted_by_cell(images: str, tmp_path: Path) -> None:
    found = curate(config(images, tmp_path, cells=["label", "style"]), lambda event: None)["cells"]
    before, after = (Dataset.open(uri) for uri in (images, str(tmp_path / "out")))
    there, kept = (Reader(d).gather(np.arange(d.header.num_samples))["style"].tolist() for d in (before, after))
    assert found == {f"a × {s}": {"samples": there.count(s), "kept": kept.count(s)} for s in sorted(set(there))}
    assert sum(cell["kept"] for cell in found.values()) == 29


def test_planted_copies_weigh_as_one_image(images: str, tmp_path: Path) -> None:
    result = curate(config(images, tmp_path, duplicates=DuplicatesConfig(0.85, 0.0)), lambda event: None)
    assert result["clusters"] == {"1": 24, "5": 1} and result["effective"] == pytest.approx(25)
    found = Dataset.open(str(tmp_path / "out")).weights()
    assert found is not None and sorted(found)[:6] == pytest.approx([0.2] * 5 + [1.0])


def test_clusters_by_a_naive_search_and_weights_of_a_power(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 8))
    features = np.concatenate([centres, centres[:7] + 0.05 * rng.normal(size=(7, 8)), centres[:3] * 2]).astype(
        np.float32
    )
    monkeypatch.setattr("rayproj.curation.duplicates.BLOCK", 11)
    found = clusters((features, 0.98))
    unit = features / np.linalg.norm(features, axis=1)[:, None]
    parent = list(range(30))

    def root(i: int) -> int:
        return i if parent[i] == i else root(parent[i])

    for i in range(30):
        for j in range(i):
            if unit[i] @ unit[j] >= 0.98:
                parent[root(i)] = root(j)
    for i in range(30):
        assert [found[i] == found[j] for j in range(30)] == [root(i) == root(j) for j in range(30)]
    for power in (0.0, 0.5, 1.0):
        of_clusters = np.bincount(found, weights(found, power))
        np.testing.assert_allclose(of_clusters, np.bincount(found) ** power)


def test_duplicates_are_removed_with_the_one_that_stays_as_the_reason(images: str, tmp_path: Path) -> None:
    """By the hash alone, and by both."""
    for name, looked in (("hash", DuplicatesConfig(hash_bits=9)), ("both", DuplicatesConfig(0.85, hash_bits=2))):
        looked.remove = True
        result = curate(config(images, tmp_path, out=str(tmp_path / name), duplicates=looked), lambda event: None)
        assert result["reasons"]["duplicate"] == 4 and result["kept"] == 25 == result["effective"]
        store = Dataset.open(str(tmp_path / name)).store
        lines = [json.loads(line) for line in store.read("rejected.jsonl").splitlines()]
        assert {n["index"]: n["reasons"]["duplicate"] for n in lines if "duplicate" in n["reasons"]} == {
            30: 9, 31: 9, 32: 9, 33: 9,
        }  # fmt: skip


def test_a_hash_is_that_of_fields_compared_one_by_one() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 3, 16, 18), dtype=np.uint8)
    y = np.tensordot([0.299, 0.587, 0.114], image[0].astype(float), axes=(0, 0)).round()
    means = [[y[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean().round() for c in range(9)] for r in range(8)]
    expected = [1 if row[c + 1] > row[c] else -1 for row in means for c in range(8)]
    assert (difference_hash(image)[0] != expected).mean() < 0.04, "but for how a half is rounded"


def test_copies_of_training_images_are_found_and_shown(
    pictures: list[dict[str, Any]], images: str, tmp_path: Path
) -> None:
    header = Header("learned from", {"image": Field("png", (3, 32, 32))}, 12, 12, ())
    learned = Dataset.create(str(tmp_path / "learned"), header)
    commit_shard(
        learned, 0, [{"key": str(i), "image": pictures[k]["image"]} for i, k in enumerate(range(10, 22))], "t", 0
    )
    rules = {
        "copied": RuleConfig(Scorer.similarity, at_most=0.999, against=learned.uri),
        "same": RuleConfig(Scorer.pixels, at_least=1.0, against=learned.uri),
    }
    result = curate(config(images, tmp_path, rules=rules), lambda event: None)
    assert result["reasons"] == {"copied": 12, "same": 12} and result["kept"] == 22
    for name, kind, exact in (("copied", "similarity", 1.0), ("same", "pixels", 0.0)):
        assert sorted((p["index"], p["nearest"]) for p in result["pairs"][name]) == [(k, k - 10) for k in range(10, 22)]
        assert all(p[kind] == pytest.approx(exact, abs=1e-4) for p in result["pairs"][name])
        picture = np.asarray(
            Image.open(io.BytesIO(Dataset.open(str(tmp_path / "out")).store.read(f"pairs-{name}.png")))
        )
        assert picture.shape == (64, 12 * 32, 3) and np.array_equal(picture[:32], picture[32:])


def test_confidence_is_the_softmax_at_the_label(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.float().mean((1, 2, 3)), torch.full((len(x),), 200.0)], 1) / 50

    monkeypatch.setattr("rayproj.classifiers.load", lambda run, device: model)
    rule = RuleConfig(Scorer.confidence, at_least=0.5, classifier="run")
    result = curate(config(images, tmp_path, rules={"unsure": rule}), lambda event: None)
    means = Reader(Dataset.open(images)).gather(np.arange(34))["image"].mean((1, 2, 3))
    assert result["reasons"] == {"unsure": int((means < 200).sum())} and 0 < result["kept"] < 34


def test_no_caption_of_the_emoji_has_personal_data() -> None:
    config = SourceConfig(kind=SourceKind.emoji, image_size=32, attributes=["caption"])
    assert not [s["caption"] for s in open_source(config).samples() if personal(s["caption"])]


def test_captions_from_templates(images: str, tmp_path: Path) -> None:
    captions = {"caption_style": "a {style}  emoji: {caption}", "caption_plain": "emoji"}
    curate(config(images, tmp_path, rules={}, captions=captions, shard_size=9), lambda event: None)
    dataset = Dataset.open(str(tmp_path / "out"))
    rows = Reader(dataset).gather(np.arange(34))
    assert dataset.header.num_shards == 4
    for caption, style, made in zip(rows["caption"], rows["style"], rows["caption_style"], strict=True):
        assert made == f"a {style} emoji: {caption}"
    assert set(rows["caption_plain"]) == {"emoji"}


def test_a_network_as_a_scorer(tmp_path: Path) -> None:
    """An ONNX file that gives the mean of the image."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2, 3], keepdims=0)
    given = helper.make_tensor_value_info("x", kind, ["n", 3, 16, 16])
    graph = helper.make_graph([node], "mean", [given], [helper.make_tensor_value_info("y", kind, ["n"])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), str(tmp_path / "mean.onnx"))
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 32, 32), dtype=np.uint8)
    found = scorer(RuleConfig(Scorer.model, at_most=0.5, model=str(tmp_path / "mean.onnx"), size=16))({"image": images})
    np.testing.assert_allclose(found, resized(images, 16).mean((1, 2, 3)), rtol=1e-5)


def test_of_a_detector_the_greatest_score_counts(tmp_path: Path) -> None:
    """An ONNX file that gives [n, channels, rows]: the means of the rows of each channel."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[3], keepdims=0)
    given = helper.make_tensor_value_info("x", kind, ["n", 3, 16, 16])
    graph = helper.make_graph([node], "rows", [given], [helper.make_tensor_value_info("y", kind, ["n", 3, 16])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), str(tmp_path / "rows.onnx"))
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    rule = RuleConfig(Scorer.model, at_most=0.5, model=str(tmp_path / "rows.onnx"), size=16, outputs=[1])
    expected = [max(row.mean() for row in image[1]) for image in resized(images, 16)]
    np.testing.assert_allclose(scorer(rule)({"image": images}), expected, rtol=1e-5)
    both = [max(row.mean() for channel in (0, 2) for row in image[channel]) for image in resized(images, 16)]
    np.testing.assert_allclose(scorer(replace(rule, outputs=[0, 2]))({"image": images}), both, rtol=1e-5)


def test_a_detector_that_ships_in_a_package_finds_what_its_own_code_does() -> None:
    """A portrait, matplotlib's, and photographs, foolbox's: there is a face, and nothing is uncovered."""
    nudenet = pytest.importorskip("nudenet")
    foolbox = pytest.importorskip("foolbox")
    files = [Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")]
    files += sorted(Path(foolbox.__file__).parent.glob("data/imagenet_*.jpg"))[:6]
    pictures = [Image.open(file).convert("RGB").resize((320, 320)) for file in files]
    images = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])
    nothing = RuleConfig(Scorer.model, at_most=0.3, model="nudenet")
    assert not nothing.outside(scorer(nothing)({"image": images})).any()
    said = described(SafetyConfig({"uncovered": nothing}))
    assert list(said["models"]) == ["nudenet"] and planned(said).rules == {"uncovered": nothing}
    face = RuleConfig(Scorer.model, at_most=1, model=file_of("nudenet"), size=320, outputs=[5])
    found, theirs = scorer(face)({"image": images}), []
    # As an array of red, green and blue: of a file it swaps the first and the last twice.
    for picture in pictures:
        seen = nudenet.NudeDetector().detect(np.asarray(picture))
        theirs.append(max((one["score"] for one in seen if one["class"] == "FACE_FEMALE"), default=0.0))
    assert theirs[0] > 0.4
    told = np.array(theirs) > 0  # theirs leaves out what is below 0.2
    np.testing.assert_allclose(found[told], np.array(theirs)[told], atol=0.02)
    assert found[~told].max() < 0.25
    safe = Safety(SafetyConfig({"face": replace(face, at_most=0.4)}))
    grey = safe.greyed(images)
    assert safe.reasons(images)[0] == ["face"] and len(np.unique(grey[0])) == 1 and np.array_equal(grey[1], images[1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rules": {"x": RuleConfig(Scorer.words, at_least=1, text="title")}}, "no field 'title'"),
        ({"rules": {"x": RuleConfig(Scorer.contrast, at_least=500)}}, r"No image .* passes all rules \(x: 34\)"),
        (
            {"rules": {"x": RuleConfig(Scorer.model, at_most=1, model="none.onnx")}},
            "'none.onnx' of a rule is not there",
        ),
        ({"captions": {"caption_x": "{colour}"}}, "no field 'colour'"),
        ({"captions": {"caption_x": "{"}}, "cannot be read"),
    ],
)
def test_what_cannot_be_curated_is_said(changes: dict[str, Any], says: str, images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        curate(config(images, tmp_path, **changes), lambda event: None)
    assert not Dataset.open(images).store.exists("../out/dataset.json")


def test_rules_that_mean_nothing() -> None:
    assert "at_least" in RuleConfig().problems()[0]
    assert "no classifier of unsafe" in RuleConfig(Scorer.model, at_most=0.5).problems()[0]
    assert "needs words" in RuleConfig(Scorer.blocked, at_most=0).problems()[0]


def test_samples_are_drawn_as_often_as_their_weights_say() -> None:
    rng = np.random.default_rng(0)
    w = rng.random(200) * (rng.random(200) < 0.8)
    order = Weighted(w, shard_size=16, global_batch=32, seed=3)
    drawn = np.concatenate([order.indices(step) for step in range(250)])  # 40 epochs
    assert len(drawn) == 8000
    counts, expected = np.bincount(drawn, minlength=200), 8000 * w / w.sum()
    assert (counts[w == 0] == 0).all() and np.abs(counts - expected).max() < 12
    epoch = np.bincount(drawn[:200], minlength=200)
    share = 200 * w / w.sum()
    assert (epoch >= np.floor(share - 1e-9)).all() and (epoch <= np.ceil(share + 1e-9)).all()
    again = Weighted(w, shard_size=16, global_batch=32, seed=3)
    assert np.array_equal(again.indices(113), order.indices(113)), "a function of the step alone"
    assert not np.array_equal(Weighted(w, 16, 32, 4).indices(0), order.indices(0))
    # Reads stay within a window of eight shards.
    assert len(np.unique(drawn[:32] // 16)) <= 9
