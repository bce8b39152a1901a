"""Whatever is killed in whichever gap, the finished run is the undisturbed one.

The points are those that the source has: a new one is walked too, and fails the walk if no kind of run here passes it.
"""

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayproj.data.dataset import Dataset
from rayproj.engine.checkpoint import commits, orphans
from rayproj.privacy.budget import registrations, set_budget
from rayproj.storage.store import Store, to_json
from tests.support import images, private, regression, studies
from tests.support.commands import ROOT, run
from tests.support.ranks import run_ranks

SOURCE = "".join(path.read_text() for path in sorted((ROOT / "rayproj").rglob("*.py")))
POINTS = sorted(set(re.findall(r'faults\.maybe\("([^"]+)"', SOURCE)))
STEPS = 6
Reference = Callable[[str], Any]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What an undisturbed run of a kind comes to; each is run once."""
    found: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in found:
            found[kind] = UNDISTURBED[kind](tmp_path_factory.mktemp("undisturbed"))
        return found[kind]

    return get


@pytest.mark.parametrize("point", POINTS)
def test_killed_in_every_gap(point: str, tmp_path: Path, reference: Reference) -> None:
    KINDS[point.split(".")[0]](point, tmp_path, reference)


def assert_same(found: list[dict], expected: list[dict], *kinds: str) -> None:
    for a, b in zip(found, expected, strict=True):
        for kind in kinds:
            assert a[kind].keys() == b[kind].keys()
            assert all(torch.equal(a[kind][name], value) for name, value in b[kind].items())


def settings() -> Any:
    return regression.config(STEPS, every_steps=2, keep_last=1)


def undisturbed_training(folder: Path) -> list[dict]:
    return run_ranks(regression.run, 2, str(folder), settings(), "only")


def training(point: str, folder: Path, reference: Reference) -> None:
    """Two ranks, dropout and noise included; a checkpoint every other step, of which the last is kept."""
    # Of a checkpoint one rank alone, the last to be through, passes what is at or behind the commit; the first of them
    # has nothing to delete.
    hit = 1 if point in ("checkpoint.after_commit", "checkpoint.half_deleted", "checkpoint.after_all") else 2
    env = {"RAYPROJ_FAULT": f"{point}:*:{hit}"}
    died = run_ranks(regression.run, 2, str(folder), settings(), "first", env=env, check=False)
    assert -signal.SIGKILL in died
    store = Store(str(folder))
    before = [commit.step for commit in commits(store)]
    resumed = run_ranks(regression.run, 2, store.uri, settings(), "second")
    assert {"type": "resumed", "step": (before or [0])[-1], "ranks": 2} in resumed[0]["events"]
    assert_same(resumed, reference("training"), "weights", "ema")
    assert [commit.step for commit in commits(store)] == [STEPS] and orphans(store) == []


def undisturbed_private(folder: Path) -> list[dict]:
    """Noise is keyed by the start, of which a killed run has two: so has this one, by a stop and no kill."""
    run_ranks(private.run, 2, str(folder), every_step(), "first", "", 3)
    return run_ranks(private.run, 2, str(folder), every_step(), "second")


def every_step() -> Any:
    config = private.settings(STEPS, every_steps=1)
    config.checkpoint.asynchronous = False
    return config


def releases(point: str, folder: Path, reference: Reference) -> None:
    """Two ranks; the kill is at the fourth release, that of step 3."""
    env = {"RAYPROJ_FAULT": f"{point}:*:4"}
    died = run_ranks(private.run, 2, str(folder), every_step(), "first", env=env, check=False)
    assert died[0] == -signal.SIGKILL
    resumed = run_ranks(private.run, 2, str(folder), every_step(), "second")
    assert_same(resumed, reference("private"), "weights")
    charged = [(3, 0)] if point == "ledger.after_record" else []  # perhaps released, so charged
    assert sorted(resumed[0]["releases"]) == sorted([*reference("private")[0]["releases"], *charged])


def undisturbed_shards(folder: Path) -> str:
    return images.write(str(folder)).manifest_hash()


def shards(point: str, folder: Path, reference: Reference) -> None:
    """Four shards by two makers under Ray. A maker's death the driver answers; the driver's own, the same command."""
    command = [sys.executable, "-m", "tests.support.produce", str(folder)]
    died = folder / "died"
    env = {"RAYPROJ_FAULT": f"{point}:*:1", "RAYPROJ_FAULT_ONCE": str(died)}
    first = run(*command, **env)
    assert died.exists()
    if point.startswith("lease."):
        assert first.returncode == -signal.SIGKILL
        first = run(*command)
    assert first.returncode == 0, first.stderr
    dataset = Dataset.open(str(folder / "data"))
    assert dataset.complete and dataset.manifest_hash() == reference("shards")


def registration(point: str, folder: Path, reference: Reference) -> None:
    """One run, which has room in the budget; two have not, and a run that died is counted wherever it died."""
    data, plan = images.write(str(folder / "data")), private.mechanism(4)
    set_budget(data.uri, 1.1 * plan.epsilon(), plan.delta)

    def register(name: str, **env: str) -> Any:
        return run(sys.executable, "-m", "tests.support.register", data.uri, str(folder / name), **env)

    assert register("one", RAYPROJ_FAULT=f"{point}:*:1").returncode == -signal.SIGKILL
    again = register("one")
    assert again.returncode == 0, again.stderr
    assert "budget" in register("other").stderr
    assert [(Path(one.run).name, one.accepted) for one in registrations(data.store)] == [
        ("one", True),
        ("other", False),
    ]


def study(folder: Path) -> Store:
    store = Store(str(folder / "study"))
    store.put_once("study.json", to_json(studies.made(folder, per_rater=8, block=4).to_dict()))
    return store


def undisturbed_ratings(folder: Path) -> list[str]:
    store = study(folder)
    assert run(sys.executable, "-m", "tests.support.rate", store.uri, "r0001").returncode == 0
    return store.list()


def rating(point: str, folder: Path, reference: Reference) -> None:
    """A rater's third answer: what was kept is not asked again, and the rest comes as if nothing had happened."""
    store = study(folder)
    command = [sys.executable, "-m", "tests.support.rate", store.uri, "r0001"]
    assert run(*command, RAYPROJ_FAULT=f"{point}:*:3").returncode == -signal.SIGKILL
    assert len(store.list()) == 1 + (3 if point == "rating.after_put" else 2)
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert store.list() == reference("ratings") and len(store.list("ratings")) == 8


KINDS = {
    "train": training,
    "checkpoint": training,
    "ledger": releases,
    "shard": shards,
    "lease": shards,
    "budget": registration,
    "rating": rating,
}
UNDISTURBED = {
    "training": undisturbed_training,
    "private": undisturbed_private,
    "shards": undisturbed_shards,
    "ratings": undisturbed_ratings,
}
