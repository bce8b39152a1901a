"""The study of obfuscations in small, as a chain of jobs on Ray."""

import json
from pathlib import Path

import numpy as np
import pytest

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.obfuscation import CLEAN, OBFUSCATIONS
from tests.support.commands import ROOT, run

pytestmark = pytest.mark.slow
TRAINED = ("none", "colour", "transformation", "overlay", "training")


def test_the_study_in_small_and_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    words = [str(ROOT / "configs" / "obfuscation_study.yaml"), f"root={tmp_path}"]
    words += ["import_data.data.fractions={train: 0.1, rest: 0.9}", "obfuscate.obfuscate.samples=20"]
    words += ["learn_obfuscations.learn.patch_steps=2", "learn_obfuscations.learn.style_steps=2"]
    words += [f"{name}.train.{what}" for name in TRAINED for what in ("steps=4", "batch=32")]
    words += [f"{name}.pool.actors=1" for name in ("obfuscate", "evaluate_obfuscations")]
    done = run("rayproj", "chain", *words, timeout=290)
    assert done.returncode == 0, done.stderr
    images = Dataset.open(f"{tmp_path}/obfuscated")
    assert images.header.fields["obfuscation"].values == (CLEAN, *OBFUSCATIONS) and images.header.num_samples == 23 * 20
    result = json.loads((tmp_path / "evaluate_obfuscations" / "result.json").read_text())
    assert set(result["metrics"]) == set(TRAINED) and set(result["images"].values()) == {20}
    assert len(result["seen"]["training"]) == 19 and result["seen"]["none"] == []
    for found in result["metrics"].values():
        assert found["worst-all-top-1"] <= min(found[f"{name}-top-1"] for name in OBFUSCATIONS)
        assert found["Clean-top-1"] <= found["Clean-top-3"] <= found["Clean-top-10"] == pytest.approx(1)
    guesses = Reader(Dataset.open(f"{tmp_path}/guesses/none")).gather(np.arange(23 * 20))
    assert (np.sort(guesses["top"], 1) == np.arange(10)).all()
    assert "Does it see through obfuscations?" in (tmp_path / "report.html").read_text()
    before = {path: path.stat().st_mtime for path in (tmp_path / "guesses").rglob("*") if path.is_file()}
    again = run("rayproj", "chain", *words, timeout=100)
    assert again.returncode == 0 and before == {path: path.stat().st_mtime for path in before}
