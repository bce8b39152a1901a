"""A sweep: which points its grids mean, and that a killed one goes on to the same table with finished points untouched."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from rayproj.jobs.sweep import Config  # type: ignore[import-not-found]

from rayproj import chain, config
from rayproj.classifiers.model import weights_of
from rayproj.errors import UserError
from rayproj.sweep import GridConfig, SweepConfig, points
from tests.support import images
from tests.support.commands import ROOT, environment, run

JOB = """
data: {data}
wait_seconds: 0
augment: {{shift: 1}}
classifier: {{channels: [8, 8]}}
train: {{steps: 40, batch: 20, checkpoint: {{every_seconds: 0}}}}
cluster: {{ranks: 0}}
tracking: {{wandb: disabled}}
"""


def grid(**axes: object) -> GridConfig:
    return GridConfig(
        str(ROOT / "configs" / "train_classifier.yaml"), "train_classifier", ["train.steps=7"], dict(axes)
    )


def test_points_are_all_combinations_and_shared_ones_are_one() -> None:
    seeds = {"run.seed": [0, 1]}
    arms = {"arm": {"plain": [], "focal": ["objective.loss=focal", "train.batch=8"]}}
    found = points(
        SweepConfig("out", grids={"arms": grid(**arms, **seeds), "one": grid(arm={"plain": []}, **{"run.seed": [1]})})
    )
    assert [p.name for p in found] == ["arm=plain,seed=0", "arm=plain,seed=1", "arm=focal,seed=0", "arm=focal,seed=1"]
    assert [p.grids for p in found] == [("arms",), ("arms", "one"), ("arms",), ("arms",)]
    [[(stage, job, config)]] = found[3].stages
    assert stage == job == "train_classifier" and found[3].axes == {"arm": "focal", "seed": "1"}
    assert config["train"]["steps"] == 7 and config["train"]["batch"] == 8 and config["run"]["seed"] == 1
    assert config["objective"]["loss"] == "focal" and config["run"]["dir"] == "out/arm=focal,seed=1"


def test_a_chain_has_its_root_at_the_point() -> None:
    one = GridConfig(str(ROOT / "configs" / "demo.yaml"), axes={"train_diffusion.train.steps": [5, 6]})
    found = points(SweepConfig("out", grids={"steps": one}))
    assert [p.name for p in found] == ["steps=5", "steps=6"]
    stages = {name: config for together in found[1].stages for name, _, config in together}
    assert stages["train_diffusion"]["train"]["steps"] == 6
    assert stages["train_diffusion"]["run"]["dir"] == "out/steps=6/train_diffusion"


def test_the_example_is_six_trainings_on_what_the_demo_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = points(config.load(Config, "configs/sweep.yaml").sweep)
    assert [p.name for p in found] == [f"lr={lr},seed={seed}" for lr in ("0.0003", "0.001") for seed in (0, 1, 2)]
    demo = chain.load("configs/demo.yaml", [])
    values = [values for point in found for [(_, _, values)] in point.stages]
    assert {v["data"] for v in values} == {demo.classifier_real.data}  # type: ignore[attr-defined]
    assert {(v["consumer"], v["wait_seconds"], v["cluster"]["ranks"]) for v in values} == {("", 0, 0)}


@pytest.mark.parametrize(
    ("grids", "says"),
    [
        ({"a": grid(**{"trian.steps": [1]})}, "did you mean 'train'"),
        ({"a": grid(**{"train.batch": [0]})}, "train.batch must be positive"),
        ({"a": grid(**{"data": ["a/b"]})}, "names a folder; use no blanks and slashes"),
        ({"a": grid(x={"p": []}), "b": grid(x={"p": ["train.batch=2"]})}, "'x=p' of 'b' is another point in 'a'"),
        ({"a": GridConfig("x.yaml", "train_it")}, "no job 'train_it'; give one of audit_privacy, "),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(grids: dict[str, GridConfig], says: str) -> None:
    with pytest.raises(UserError) as refused:
        points(SweepConfig("out", grids=grids))
    assert says in str(refused.value)


def write_sweep(folder: Path) -> Path:
    """Two seeds, a group of one rank beside none, and a point whose images are not there."""
    images.write(f"{folder}/images", 120)
    (folder / "job.yaml").write_text(JOB.format(data=folder / "images"))
    template = f"template: {folder}/job.yaml, job: train_classifier"
    (folder / "sweep.yaml").write_text(
        f"""
sweep:
  out: {folder}/points
  grids:
    seeds: {{{template}, axes: {{run.seed: [0, 1, 2]}}}}
    others: {{{template}, axes: {{kind: {{later: ["data={folder}/later"], group: [cluster.ranks=1]}}}}}}
run: {{dir: {folder}/sweep}}
room: {{at_once: 1}}
tracking: {{wandb: disabled}}
"""
    )
    return folder / "sweep.yaml"


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_killed_sweep_goes_on_and_a_failed_point_is_tried_again(tmp_path: Path) -> None:
    config = write_sweep(tmp_path)
    driver = subprocess.Popen(["rayproj", "sweep", str(config)], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "points" / "seed=0" / "result.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("points/*/result.json")}
    assert 1 <= len(finished) < 4, "it was to be killed in the middle"

    done = run("rayproj", "sweep", str(config))
    assert done.returncode == 1, done.stderr
    assert "kind=later failed: UserError: There is no dataset at" in done.stderr
    assert "1 of 5 points failed (kind=later)" in done.stderr
    assert "There is no dataset" in (tmp_path / "sweep" / "failed" / "kind=later.txt").read_text()
    rows = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [row["point"] for row in rows] == ["seed=0", "seed=1", "seed=2", "kind=group"], "also what came after it"

    images.write(f"{tmp_path}/later", 120)
    assert run("rayproj", "sweep", str(config)).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished points are untouched"
    rows = {row["point"]: row for row in json.loads((tmp_path / "sweep" / "table.json").read_text())}
    assert len(rows) == 5 and rows["seed=1"]["axes"] == {"seed": "1"} and rows["kind=later"]["grids"] == ["others"]
    for name, row in rows.items():
        result = json.loads((tmp_path / "points" / name / "result.json").read_text())
        assert row["results"] == {"train_classifier": result} and result["steps"] == 40
    table = pd.read_parquet(tmp_path / "sweep" / "table.parquet").set_index("point")
    assert table.loc["seed=2", "train_classifier.samples_seen"] == 800

    weights = {name: weights_of(str(tmp_path / "points" / name)) for name in rows}
    same = [
        "seed=0",
        "kind=group",
        "kind=later",
    ]  # without a group and with one; the images of the last are the same too
    assert all(torch.equal(weights[same[0]][k], weights[other][k]) for other in same[1:] for k in weights[other])
    assert any(not torch.equal(weights["seed=0"][k], weights["seed=1"][k]) for k in weights["seed=0"])
    job = (tmp_path / "job.yaml").read_text()
    (tmp_path / "job.yaml").write_text(job.replace("steps: 40", "steps: 41"))
    other = run("rayproj", "sweep", str(config), f"run.dir={tmp_path}/another")
    assert other.returncode == 2 and "train.steps was 40, now 41" in other.stderr, (
        "points of another config are not taken"
    )
    (tmp_path / "job.yaml").write_text(job)
    before = (tmp_path / "sweep" / "table.json").stat().st_mtime_ns
    assert run("rayproj", "sweep", str(config)).returncode == 0
    assert (tmp_path / "sweep" / "table.json").stat().st_mtime_ns == before, "a finished sweep does nothing"
