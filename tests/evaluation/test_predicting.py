"""Predictions of models under obfuscations: stored, measured, and from the published files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.evaluation import predicting
from rayproj.evaluation.models import EFFICIENTNET, ExaminedConfig, open_classifier
from rayproj.evaluation.obfuscations import CONFLICT_STIMULI, metrics, read_csvs
from rayproj.evaluation.predicting import PredictConfig, Predictor, groups_of, header_of, result_of
from rayproj.obfuscation.writing import WriteConfig
from tests.data.test_tfrecords import write_published
from tests.obfuscation.test_writing import obfuscated, write_images


def write_onnx(path: Path, channels: int = 3, classes: int = 2) -> Tensor:
    """A linear model of mean colours, and its weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.linspace(-40, 40, channels * classes).reshape(channels, classes)
    mean = helper.make_node("GlobalAveragePool", ["x"], ["p"])
    flat = helper.make_node("Flatten", ["p"], ["f"])
    product = helper.make_node("MatMul", ["f", "w"], ["y"])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, None, None])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes])
    graph = helper.make_graph(
        [mean, flat, product], "g", [given], [out], [numpy_helper.from_array(weight.numpy(), "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, path)
    return weight


def predict(config: PredictConfig, name: str) -> Dataset:
    """What jobs/evaluate_obfuscations.py writes of one model."""
    dataset = Dataset.create(f"{config.out}/{name}", header_of(config, name))
    predictor = Predictor({"config": asdict(config), "model": name, "out": dataset.uri}, "cpu")
    for shard in range(dataset.header.num_shards):
        commit_shard(dataset, shard, predictor.make(shard), "test", 0.0)
    return dataset


def test_predictions_are_those_of_the_model_and_measured_as_they_are(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    images = obfuscated(WriteConfig(source.uri, f"{tmp_path}/set", ["InvertLines", "RotateImage"], shard_size=10))
    weight = write_onnx(tmp_path / "m.onnx")
    model = ExaminedConfig(str(tmp_path / "m.onnx"), classes=["a", "b"])
    config = PredictConfig(images.uri, out=f"{tmp_path}/guesses", models={"linear": model}, batch=7, intervals=20)
    dataset = predict(config, "linear")
    columns, pictures = Reader(dataset).gather(np.arange(66)), Reader(images).gather(np.arange(66))
    logits = torch.from_numpy(pictures["image"]).double().mean((2, 3)) / 255 @ weight.double()
    assert columns["top"][:, 0].tolist() == logits.argmax(1).tolist()
    assert columns["image_id"].tolist() == pictures["image_id"].tolist()
    result = result_of(config)
    right = (columns["top"][:, 0] == pictures["label"]).reshape(3, 22)
    labels = pictures["label"][:22]
    macro = lambda r: float(np.mean([r[labels == k].mean() for k in (0, 1)]))  # noqa: E731
    found = result["metrics"]["linear"]
    assert found["RotateImage-top-1"] == pytest.approx(macro(right[2])) and found["Clean-top-1"] == pytest.approx(
        macro(right[0])
    )
    assert found["worst-training-top-1"] == pytest.approx(macro(right[1] & right[2])) and found["Clean-top-3"] == 1
    low, high = result["intervals"]["linear"]["mean-training-top-1"]
    assert low <= found["mean-training-top-1"] <= high and result["seen"] == {"linear": []}
    files = read_csvs(f"{config.out}/linear/csv", ["InvertLines", "RotateImage"])
    assert metrics(files) == found
    again = PredictConfig(images.uri, out=config.out, predictions={"theirs": f"{config.out}/linear/csv"}, intervals=0)
    assert result_of(again)["metrics"]["theirs"] == found


def test_classes_are_matched_by_name_and_groups_drop_the_rest(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    images = obfuscated(WriteConfig(source.uri, f"{tmp_path}/set", ["InvertLines"]))
    write_onnx(tmp_path / "m.onnx", classes=4)
    model = ExaminedConfig(str(tmp_path / "m.onnx"), classes=["z", "b", "y", "a"])
    config = PredictConfig(images.uri, out=f"{tmp_path}/plain", models={"m": model})
    columns = Reader(predict(config, "m")).gather(np.arange(44))
    assert set(columns["label"][::2].tolist()) == {3} and set(columns["label"][1::2].tolist()) == {1}
    grouped = PredictConfig(
        images.uri, out=f"{tmp_path}/grouped", models={"m": model}, groups={"first": ["z", "b"], "last": ["y"]}
    )
    dataset = predict(grouped, "m")
    assert dataset.header.classes == ("first", "last") and dataset.header.fields["top"].shape == (2,)
    found = predicting.predictions_of(dataset)["InvertLines"]
    assert len(found.label) == 11 and set(found.label) == {0}, "images of the class a are in no group"
    wrong = PredictConfig(images.uri, out="", models={"m": model}, groups={"x": ["c"]})
    with pytest.raises(UserError, match="'c', which is no class"):
        groups_of(wrong, ("a", "b"))
    with pytest.raises(UserError, match="1000 classes"):
        groups_of(PredictConfig(conflict_stimuli=True), ("a", "b"))
    other = ExaminedConfig(str(tmp_path / "m.onnx"), classes=["p", "q", "r", "s"])
    with pytest.raises(UserError, match="give a model of the same classes"):
        predict(PredictConfig(images.uri, out=f"{tmp_path}/other", models={"m": other}), "m")
    with pytest.raises(UserError, match="The model 'm' has no class 'dog', which the images have"):
        predicting._numbers(("cat", "dog", "eel"), ("dove", "cat", "fox"), "m")
    assert predicting._numbers(("cat", "dog"), ("n01", "n02"), "m").tolist() == [0, 1]


def test_the_published_files_by_efficientnet_in_the_benchmarks_groups(tmp_path: Path) -> None:
    write_published(tmp_path / "set", ["Clean", "Halftoning"], images=6)
    model = ExaminedConfig(EFFICIENTNET, size=64)
    config = PredictConfig(f"{tmp_path}/set", out=f"{tmp_path}/guesses", models={"lite0": model}, conflict_stimuli=True)
    dataset = predict(config, "lite0")
    assert dataset.header.sizes == (3, 3, 3, 3) and dataset.header.classes == tuple(CONFLICT_STIMULI)
    images = predicting.open_obfuscated(config).gather(np.arange(12))
    p = open_classifier(model, "cpu")(torch.from_numpy(images["image"])).numpy()
    expected = np.stack([p[:, list(g)].mean(1) for g in CONFLICT_STIMULI.values()], 1).argmax(1)
    columns = Reader(dataset).gather(np.arange(12))
    assert columns["top"][:, 0].tolist() == expected.tolist() and columns["top"].shape == (12, 10)
    # Of the labels 100 to 105 only 100 is in a group, that of birds.
    found = predicting.predictions_of(dataset)["Clean"]
    assert found.label.tolist() == [3] and found.image.tolist() == ["val_000.JPEG"]


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    with pytest.raises(UserError, match=r"no dataset of jobs/obfuscate.py"):
        predicting.open_obfuscated(PredictConfig(source.uri))
    with pytest.raises(UserError, match="There is no classifier at"):
        open_classifier(ExaminedConfig(f"{tmp_path}/nowhere"), "cpu")
    assert (
        PredictConfig().problems()
        and PredictConfig(groups={"a": []}, conflict_stimuli=True, predictions={"x": ""}).problems()
    )
