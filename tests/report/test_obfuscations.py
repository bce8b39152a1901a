"""The page of obfuscations and their part of the report."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rayproj import cli
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.evaluation.models import ExaminedConfig
from rayproj.evaluation.predicting import PredictConfig, result_of
from rayproj.obfuscation import HELD_OUT, OBFUSCATIONS, TRAINING, Assets, AssetsConfig, obfuscate
from rayproj.obfuscation.writing import WriteConfig
from rayproj.report import figures
from rayproj.report.build import build
from rayproj.report.obfuscations import radar
from rayproj.storage.store import Store, to_json
from tests.evaluation.test_predicting import predict, write_onnx
from tests.obfuscation.test_writing import obfuscated, write_images


def test_the_page_shows_each_at_several_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_images(f"{tmp_path}/images")
    file = tmp_path / "page.html"
    assert cli.main(["gallery", source.uri, str(file), "--draws", "4"]) == 0 and str(file) in capsys.readouterr().out
    page = file.read_text()
    shown = [name for name, kind in OBFUSCATIONS.items() if not kind.needs]
    assert re.findall(r"<h2>(\w+)", page) == ["Clean", *shown] and page.count("held out") == len(HELD_OUT)
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="(\w+)" title="([^"]*)"', page)
    assert len(pictures) == 4 * 20 and all("strength" in title for _, name, title in pictures if name == "SwirlWarp")
    images = torch.from_numpy(Reader(source, ["image"]).gather(np.arange(4))["image"])
    row = torch.tensor([[k, 0, 0] for k in range(4)])
    expected, _ = obfuscate("InvertLines", images, row, 0, Assets.load(AssetsConfig()))
    data = next(data for data, name, _ in pictures if name == "InvertLines")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)[5::10, 5::10].transpose(2, 0, 1)
    assert np.abs(picture - expected[0].numpy()).mean() < 3
    assert cli.main(["gallery", str(tmp_path / "nowhere"), str(file)]) == 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Test images under two obfuscations, one model trained with one of them, another not, and their evaluation."""
    source = write_images(f"{tmp_path}/data/test")
    names = ["InvertLines", "RotateImage", "LowContrastTriangles"]
    images = obfuscated(WriteConfig(source.uri, f"{tmp_path}/obfuscated", names))
    write_onnx(tmp_path / "m.onnx")
    models = {name: ExaminedConfig(str(tmp_path / "m.onnx"), classes=["a", "b"]) for name in ("plain", "hardened")}
    config = PredictConfig(images.uri, out=f"{tmp_path}/guesses", models=models, intervals=10)
    for name in models:
        predict(config, name)
    result = result_of(config)
    result["seen"]["hardened"] = ["InvertLines"]
    results = {"evaluate_obfuscations": result, "obfuscate": {"dataset": images.uri}}
    for name, found in results.items():
        store = Store(str(tmp_path)).at(name)
        store.put_once("config.yaml", yaml.safe_dump(asdict(config)).encode())
        store.put_once("result.json", to_json({"job": name, "finished_at": 1.0, "seconds": 1.0, **found}))
    return tmp_path


def test_the_report_has_table_heat_map_and_pictures(root: Path) -> None:
    report, html = build(str(root), {})
    found = report["obfuscations"]["evaluate_obfuscations"]
    assert found["columns"] == ["Clean"] + [
        f"{k}-{s}" for s in ("training", "hold-out", "all") for k in ("mean", "worst")
    ]
    metrics = found["metrics"]["plain"]
    for column, (value, interval) in zip(found["columns"], found["rows"]["plain"], strict=True):
        assert value == metrics[f"{column}-top-1"] and f"{100 * value:.1f} %" in html
        assert f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}" in html
    assert "Accuracy of each classifier along a spoke for each obfuscation" in html
    assert "Accuracy by classifier and obfuscation" in html and "Images under obfuscations" in html
    assert "in a box, what a classifier was trained with" in html and "these figures do not compare with theirs" in html
    assert set(TRAINING) & {"InvertLines"} and "label among 10 guesses" in html


def test_a_radar_has_a_spoke_for_each_obfuscation_and_a_closed_line_for_each_classifier() -> None:
    values = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, np.nan, 0.7, 0.6]])
    figure = figures.radar(values, ["plain", "hardened"], ["A", "B", "C", "D"], [3])
    (axis,) = figure.axes
    for line, expected in zip(axis.lines, values, strict=True):
        assert np.allclose(line.get_xdata()[:4], [0, np.pi / 2, np.pi, 3 * np.pi / 2])
        assert np.array_equal(line.get_ydata(), [*expected, expected[0]], equal_nan=True)
        assert line.get_xdata()[4] == line.get_xdata()[0]
    assert [text.get_fontweight() for text in axis.get_xticklabels()] == ["normal"] * 3 + ["bold"]
    assert axis.get_ylim() == (0, 1) and [text.get_text() for text in figure.legends[0].texts] == ["plain", "hardened"]
    two = {"models": ["m"], "metrics": {"m": {"Clean-top-1": 1.0, "A-top-1": 0.5, "B-top-1": 0.5}}}
    assert radar(two) is None, "of less than three there is no area"
    two["metrics"]["m"]["SwirlWarp-top-1"] = 0.25  # type: ignore[call-overload,index]
    assert b"<svg" in (radar(two) or b"")


def test_obfuscated_private_images_are_not_shown(root: Path) -> None:
    source = Dataset.open(f"{root}/data/test")
    private = write_images(f"{root}/data/private")
    assert private.header == source.header
    images = obfuscated(WriteConfig(private.uri, f"{root}/obfuscated_private", ["InvertLines"]))
    result = {"job": "obfuscate", "finished_at": 1.0, "seconds": 1.0, "dataset": images.uri}
    (root / "obfuscate" / "result.json").write_bytes(to_json(result))
    assert "Images under obfuscations" not in build(str(root), {})[1]
