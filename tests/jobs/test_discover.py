"""jobs/discover_failures.py on a Ray of its own, killed and gone on with."""

import json
from pathlib import Path

import pytest

from rayproj.storage.store import to_json
from tests.support import planted
from tests.support.commands import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def words(folder: Path, name: str) -> list[str]:
    return [
        f"discover.out={folder}/{name}",
        f"run.dir={folder}/{name}/run",
        f"discover.classifier={{model: {folder}/background.pt, classes: [female, male], probabilities: true}}",
        f"discover.generator={{model: '', images: {folder}/figures, group: role}}",
        "discover.labels={female: ''}",
        "discover.attributes={background: []}",
        "discover.words=false",
        "discover.images=400",
        "discover.rounds=1",
        "discover.scale_up=40",
        "discover.quota=15",
        "pool.actors=2",
    ]


def test_killed_and_started_again_it_finds_the_same(tmp_path: Path) -> None:
    planted.train(tmp_path / "background.pt", "background")
    planted.write(str(tmp_path / "figures"), planted.figures("test", 99))
    config, texts = "configs/discover_failures.yaml", []
    for name, fault in (("whole", {}), ("killed", {"RAYPROJ_FAULT": "lease.after_finish:*:5"})):
        done = job("discover_failures", config, *words(tmp_path, name), **fault)
        if fault:
            assert done.returncode == -9, done.stderr
            done = job("discover_failures", config, *words(tmp_path, name))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / name / "failures.json").read_text())
        assert found["search"]["findings"][0]["name"] == "female, background=green"
        assert found["search"]["images"] <= 400
        assert found["search"]["adversarial"]["quotas"]["female, background=green"]["failures"] == 15
        texts.append(to_json(found).replace(str(tmp_path / name).encode(), b"ROOT"))
        assert (tmp_path / name / "failures.html").read_text().startswith("<!doctype html>")
    assert texts[0] == texts[1]
    again = job("discover_failures", config, *words(tmp_path, "whole"), "discover.images=401")
    assert again.returncode == 2 and "belongs to another config (discover.images was 400, now 401)" in again.stderr
