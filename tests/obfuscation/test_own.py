"""A user's own obfuscations take part wherever the benchmark's do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rayproj import cli
from rayproj.classifiers.augment import AugmentConfig, augmented
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.models import ExaminedConfig
from rayproj.evaluation.predicting import PredictConfig, result_of
from rayproj.evaluation.shift import ShiftConfig, conditions
from rayproj.obfuscation import CLEAN, Assets, AssetsConfig, ObfuscateConfig, chosen, obfuscate, regenerate
from rayproj.obfuscation.writing import WriteConfig
from rayproj.report.obfuscations import heat_map, obfuscations_of
from tests.evaluation.test_predicting import predict, write_onnx
from tests.obfuscation.test_transforms import pictures, rows
from tests.obfuscation.test_writing import obfuscated, write_images

DARKEN, NEGATIVE = "tests.support.own_obfuscations:Darken", "tests.support.own_obfuscations:Negative"
ASSETS = Assets.load(AssetsConfig())


def test_they_are_drawn_by_key_and_come_again_from_their_parameters() -> None:
    images = pictures()
    changed, records = obfuscate(DARKEN, images, rows(6), 3, ASSETS)
    expected = np.clip(images.numpy() - np.array([r["by"] for r in records], np.float32)[:, None, None, None], 0, 255)
    assert np.array_equal(changed.numpy(), expected.round()) and len({r["by"] for r in records}) == 6
    alone, _ = obfuscate(DARKEN, images[4:], rows(2, 4), 3, ASSETS)
    assert torch.equal(alone, changed[4:])
    assert torch.equal(regenerate(DARKEN, images, json.loads(json.dumps(records)), ASSETS), changed)
    hardest = [r["by"] for r in obfuscate(DARKEN, images, rows(6), 3, ASSETS, 5)[1]]
    assert min(hardest) >= 120 and max(hardest) <= 140
    negative, records = obfuscate(NEGATIVE, images, rows(6), 3, ASSETS)
    assert torch.equal(negative, 255 - images) and records == [{}] * 6
    assert torch.equal(regenerate(NEGATIVE, images, records, ASSETS), negative)


def test_training_draws_them_beside_the_others() -> None:
    config = ObfuscateConfig([NEGATIVE, "InvertLines"], 1.0, weights={NEGATIVE: 3.0})
    assert not config.problems() and config.drawn == ("InvertLines", NEGATIVE) and config.shares() == [0.25, 0.75]
    images = pictures(6).repeat(20, 1, 1, 1)
    found = augmented(images, rows(120), 0, AugmentConfig(0, False, obfuscate=config))
    share = (found == 255 - images).flatten(1).all(1).float().mean()
    assert share == pytest.approx(0.75, abs=0.1)
    shift = ShiftConfig(test="t", corruptions=[], obfuscations=[DARKEN])
    condition = next(c for c in conditions(shift) if c.family == "obfuscated")
    assert condition.name == DARKEN
    assert torch.equal(condition.change(images[:6], rows(6)), obfuscate(DARKEN, images[:6], rows(6), 0, ASSETS)[0])


def test_they_are_written_judged_and_shown(tmp_path: Path) -> None:
    source = write_images(f"{tmp_path}/images")
    images = obfuscated(WriteConfig(source.uri, f"{tmp_path}/set", [DARKEN, "RotateImage", NEGATIVE]))
    assert images.header.fields["obfuscation"].values == (CLEAN, "RotateImage", DARKEN, NEGATIVE)
    assert images.header.provenance["obfuscations"][DARKEN]["by"]["high"] == 140
    columns = Reader(images).gather(np.arange(88))
    pixels = Reader(source).gather(np.arange(22))["image"]
    assert np.array_equal(columns["image"][66:], 255 - pixels) and columns["parameters"][70] == "{}"
    write_onnx(tmp_path / "m.onnx")
    model = ExaminedConfig(str(tmp_path / "m.onnx"), classes=["a", "b"])
    config = PredictConfig(images.uri, out=f"{tmp_path}/guesses", models={"linear": model}, intervals=5)
    predict(config, "linear")
    result = result_of(config)
    found = result["metrics"]["linear"]
    assert 0 <= found[f"{DARKEN}-top-1"] <= 1 and found["mean-all-top-1"] == found["RotateImage-top-1"], "in no mean"
    assert obfuscations_of(result) == [CLEAN, "RotateImage", DARKEN, NEGATIVE] and b"Darken" in heat_map(result)
    file = tmp_path / "page.html"
    assert cli.main(["gallery", source.uri, str(file), "--draws", "2", "--names", DARKEN, "Interleave"]) == 0
    page = file.read_text()
    assert "All values lowered." in page and page.count("<h2>") == 3 and "by 40 to 140" in page


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Blur", "There is no obfuscation 'Blur'.*your own as package.module:Class"),
        ("nowhere.at_all:Blur", "cannot be imported .*No module named 'nowhere'.*PYTHONPATH of every worker"),
        ("tests.support.own_obfuscations:Blur", "cannot be imported .*no attribute 'Blur'"),
        ("tests.support.own_obfuscations:Undecorated", "is no obfuscation; derive a dataclass"),
        ("tests.support.own_obfuscations:WithoutRange", "annotated with their range"),
        ("json:dumps", "is no obfuscation"),
    ],
)
def test_what_is_none(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen([name])
    assert ObfuscateConfig([name]).problems()


def test_one_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"Halved makes uint8 \[6, 3, 40, 20\] of uint8 \[6, 3, 40, 40\]"):
        obfuscate("tests.support.own_obfuscations:Halved", pictures(), rows(6), 0, ASSETS)
