"""jobs/discover_failures.py on a Ray of its own: open-ended, with a text-to-image pipeline, killed and gone on with."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rayproj.data.dataset import Dataset
from rayproj.storage.store import to_json
from tests.support import pipelines, planted
from tests.support.commands import job

pytestmark = pytest.mark.slow


class Brightness(nn.Module):
    """Probabilities of "dark" and "bright", by the mean of the pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = torch.sigmoid(40 * (images.mean((1, 2, 3)) - 0.5))
        return torch.stack([1 - bright, bright], 1)


def words(folder: Path, name: str) -> list[str]:
    return [
        f"discover.out={folder}/{name}",
        f"run.dir={folder}/{name}/run",
        f"discover.classifier={{model: {folder}/brightness.pt, classes: [dark, bright], probabilities: true}}",
        f"discover.generator={{pipeline: {folder}/pipeline, size: [16, 16], sampler: {{steps: 1, guidance: 1.5}}}}",
        "discover.labels={dark: a dark thing, bright: a bright thing}",
        "discover.attributes={mood: [glad, sad]}",
        f"discover.captions={{images: {folder}/known}}",
        "discover.embedder={size: 32}",
        "discover.images=64",
        "discover.shard_size=8",
        "discover.level=0.5",
        "discover.least_ratio=1.0",
        "discover.scale_up=12",
        "pool.actors=2",
    ]


def test_killed_and_started_again_it_finds_the_same(tmp_path: Path) -> None:
    pipelines.write(tmp_path / "pipeline")
    torch.jit.trace(Brightness(), torch.zeros(2, 3, 16, 16)).save(str(tmp_path / "brightness.pt"))
    planted.write(str(tmp_path / "known"), {name: column[:32] for name, column in planted.figures("test").items()}, 16)
    config, texts = "configs/discover_failures.yaml", []
    for name, fault in (("whole", {}), ("killed", {"RAYPROJ_FAULT": "lease.after_finish:*:5"})):
        done = job("discover_failures", config, *words(tmp_path, name), **fault)
        if fault:
            assert done.returncode == -9, done.stderr
            done = job("discover_failures", config, *words(tmp_path, name))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / name / "failures.json").read_text())
        assert found["search"]["images"] <= 64
        assert Dataset.open(str(tmp_path / name / "look-1")).complete
        texts.append(to_json(found).replace(str(tmp_path / name).encode(), b"ROOT"))
        assert (tmp_path / name / "failures.html").read_text().startswith("<!doctype html>")
    assert texts[0] == texts[1]
    again = job("discover_failures", config, *words(tmp_path, "whole"), "discover.images=65")
    assert again.returncode == 2 and "belongs to another config (discover.images was 64, now 65)" in again.stderr
