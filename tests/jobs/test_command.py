"""Job scripts on the command line: one clear sentence for what the user can put right, and a stop that loses nothing."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rayproj.engine.checkpoint import commits, load_ema
from rayproj.storage.store import Store
from tests.support.commands import ROOT, environment, job, run

SOURCE = ["data.source.kind=fashion_mnist", 'data.source.path=""', "data.fractions={public: 0.1, rest: 0.9}"]
RAYPROJ = [sys.executable, "-m", "rayproj.cli"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small imported dataset."""
    folder = tmp_path_factory.mktemp("data")
    done = job("import_data", "configs/import_data.yaml", *SOURCE, f"data.out={folder}", f"run.dir={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder


def classifier(data: Path, run_dir: Path, *more: str) -> list[str]:
    """A training that begins within seconds: its one rank needs no diffusers."""
    return [
        f"data={data}/public", 'consumer=""', f"run.dir={run_dir}", "classifier.channels=[8,8,8]", "train.steps=150",
        "train.batch=16", "train.log_every=5", "train.checkpoint.every_steps=10", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.stepz=3"], "did you mean 'train.steps'?"),
        (["train.steps=many", "train.batch=0.5x"], "these problems"),
        (["data=/nowhere/at/all", "wait_seconds=1"], "There is no dataset at '/nowhere/at/all'"),
        (["train.batch=15", "cluster.ranks=2"], "does not divide over 2 ranks"),
        (["cluster.ranks=64", "cluster.start_timeout=1"], "needs 64 ranks"),
    ],
)
def test_what_the_user_can_put_right(data: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    done = job("train_classifier", "configs/train_classifier.yaml", *classifier(data, tmp_path / "run"), *overrides)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert "error: " in done.stderr


def test_a_missing_config(tmp_path: Path) -> None:
    done = job("train_classifier", tmp_path / "no.yaml")
    assert done.returncode == 2 and "no.yaml' does not exist" in done.stderr


def test_an_undecodable_image_is_named_and_the_traceback_is_kept(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nx.png,a\n")
    (tmp_path / "x.png").write_bytes(b"no picture")
    source = ["data.source.kind=image_folder", f"data.source.path={tmp_path}", "data.fractions={a: 1.0}"]
    done = job("import_data", "configs/import_data.yaml", *source, f"data.out={tmp_path}/o", f"run.dir={tmp_path}/run")
    assert done.returncode == 2 and "'x.png' cannot be decoded" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_dir_of_another_config_and_a_stop_that_loses_nothing(data: Path, tmp_path: Path) -> None:
    """SIGINT in the middle: exit 0 after a commit, with the command to go on; and that gives what an undisturbed run
    gives, bit for bit. Another config for the same run dir is refused meanwhile."""
    script, config = "jobs/train_classifier.py", "configs/train_classifier.yaml"
    words = classifier(data, tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, script, config, *words], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    store = Store(str(tmp_path / "run"))
    deadline = time.monotonic() + 90
    while not commits(store) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "To go on: python" in stderr and script in stderr
    stopped_at = commits(store)[-1].step
    assert 10 <= stopped_at < 150 and not store.exists("result.json")

    other = job("train_classifier", config, *words, "train.batch=32")
    assert other.returncode == 2 and "train.batch was 16, now 32" in other.stderr

    resumed = run(*RAYPROJ, "resume", store.uri)
    assert resumed.returncode == 0 and re.search(rf"going on from step {stopped_at}", resumed.stderr)
    undisturbed = job("train_classifier", config, *classifier(data, tmp_path / "other"))
    assert undisturbed.returncode == 0
    first, second = load_ema(store)[0], load_ema(Store(str(tmp_path / "other")))[0]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def start(data: Path, run_dir: Path, steps: int = 2000) -> subprocess.Popen[str]:
    """A driver in the background, after its first commit."""
    words = [*classifier(data, run_dir), f"train.steps={steps}", "train.checkpoint.every_steps=5"]
    command = [sys.executable, "jobs/train_classifier.py", "configs/train_classifier.yaml", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not commits(Store(str(run_dir))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def test_stopped_from_elsewhere_and_seen_from_there(data: Path, tmp_path: Path) -> None:
    process = start(data, tmp_path / "run")
    try:
        words = [*classifier(data, tmp_path / "run"), "train.steps=2000", "train.checkpoint.every_steps=5"]
        second = job("train_classifier", "configs/train_classifier.yaml", *words)
        assert second.returncode == 2 and f"process {process.pid} works on the run" in second.stderr
        assert "running" in run(*RAYPROJ, "status", str(tmp_path)).stdout
        assert "commit and stop" in run(*RAYPROJ, "stop", str(tmp_path / "run")).stdout
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 and "To go on: python" in stderr
    finally:
        process.kill()
    assert "stopped" in run(*RAYPROJ, "status", str(tmp_path)).stdout
    said = run(*RAYPROJ, "logs", str(tmp_path / "run"), "--follow")
    assert said.returncode == 0
    lines = said.stdout.splitlines()
    assert "begun on" in lines[0] and "step 5  loss" in lines[1] and lines[-1].endswith("stopped")


def test_a_second_ctrl_c_and_a_killed_driver_leave_the_last_commit_good(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(data, run_dir, 200)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and "Leaving at once; the last commit is good." in stderr
    reached = commits(Store(str(run_dir)))[-1].step
    process = start(data, run_dir, 200)
    while commits(Store(str(run_dir)))[-1].step == reached:
        time.sleep(0.02)
    process.kill()
    process.wait()
    elsewhere = ["cluster.ranks=2", "train.engine.zero_stage=3", "train.micro_batch=4", "train.log_every=1000"]
    again = run(*RAYPROJ, "resume", str(run_dir), *elsewhere)
    assert again.returncode == 0 and "driver of the last attempt was lost" in again.stderr, again.stderr
    assert commits(Store(str(run_dir)))[-1].zero_stage == 3


def test_doctor_says_what_is_fine(tmp_path: Path) -> None:
    done = run(*RAYPROJ, "doctor", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    assert f"{tmp_path}: of two creators of a file one wins" in done.stdout and not list(tmp_path.iterdir())


def test_doctor_says_what_to_do_about_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = {"WANDB_MODE": "online", "HOME": "/nonexistent", "RAY_ADDRESS": "127.0.0.1:9"}
    bad = run(*RAYPROJ, "doctor", str(tmp_path / "file"), RAY_API_SERVER_ADDRESS="http://127.0.0.1:9", **settings)
    assert bad.returncode == 1 and "Traceback" not in bad.stderr
    found = {line[5:].split("  ")[0]: line for line in bad.stdout.splitlines() if line.startswith("BAD")}
    assert set(found) == {"wandb", "ray address", "ray dashboard", "store"}
    assert "set WANDB_API_KEY" in found["wandb"] and "check the address" in found["ray dashboard"]
    assert "start that cluster" in found["ray address"] and "make it writable" in found["store"]


def test_status_of_nothing(tmp_path: Path) -> None:
    done = run(*RAYPROJ, "status", str(tmp_path))
    assert done.returncode == 2 and "There is no run below" in done.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", ["import_data", "train_classifier"])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(data: Path, tiny_disk: Path, name: str) -> None:
    words = {
        "import_data": [*SOURCE, f"data.out={tiny_disk}/data", f"run.dir={tiny_disk}/run"],
        "train_classifier": [
            *classifier(data, tiny_disk / "run"),
            "classifier.channels=[64,64,64]",
            "train.steps=12",
        ],
    }[name]
    full = job(name, f"configs/{name}.yaml", *words)
    assert full.returncode == 2 and "no space left" in full.stderr and "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    again = job(name, f"configs/{name}.yaml", *words)
    assert again.returncode == 0, again.stderr
    assert (tiny_disk / "run" / "result.json").exists()
