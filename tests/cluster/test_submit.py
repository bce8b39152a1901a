"""A real Ray head with its dashboard, and jobs handed to it both ways."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment, run

RAYPROJ = [sys.executable, "-m", "rayproj.cli"]


def free_port(low: int = 6400, high: int = 9900) -> int:
    """A port outside Ray's workers' range, 10002 to 19999."""
    for port in range(low + os.getpid() % 500, high):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a dashboard; the cluster is this test's own, and only its processes are ended."""
    gcs = free_port()
    dashboard, client = free_port(gcs + 1), free_port(gcs + 10)
    folder = tempfile.mkdtemp(prefix="rp", dir="/tmp")  # Ray's sockets need a short path
    command = [str(ROOT / "cluster" / "local.sh"), str(gcs), str(dashboard), "--num-cpus=2"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    # An empty PYTHONPATH: the job's working directory alone must be enough.
    process = subprocess.Popen(
        command, env=environment(PYTHONPATH=""), start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(280)
def test_rayproj_submit_and_ray_job_submit(head: str, tmp_path: Path) -> None:
    source = ["data.source.kind=fashion_mnist", 'data.source.path=""', "data.fractions={public: 0.1, rest: 0.9}"]
    words = [*source, f"data.out={tmp_path}/data", f"run.dir={tmp_path}/import"]
    job = [*RAYPROJ, "submit", "jobs/import_data.py", "configs/import_data.yaml", *words, "--address", head, "--follow"]
    done = run(*job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done in" in done.stdout and "succeeded" in done.stdout
    assert json.loads((tmp_path / "import" / "result.json").read_text())["samples"] == 12000

    entry = ["python", "jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", f"data={tmp_path}/data/public"]
    entry += [f"run.dir={tmp_path}/ae", "train.steps=4", "train.batch=8", "autoencoder.channels=[8,8,8]"]
    ray = str(Path(sys.executable).parent / "ray")
    excludes = json.dumps({"excludes": [".git", ".venv", "runs", "dist"]})
    by_hand = run(
        ray, "job", "submit", "--address", head, "--working-dir", ".", "--runtime-env-json", excludes, "--", *entry
    )
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    result = json.loads((tmp_path / "ae" / "result.json").read_text())
    assert (result["steps"], result["ranks"]) == (4, 2)

    failing = [*RAYPROJ, "submit", "jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", "train.stepz=1"]
    failed = run(*failing, "--address", head, "--follow")
    assert failed.returncode == 2 and "did you mean 'train.steps'?" in failed.stdout


def test_a_dry_run_says_what_would_be_sent() -> None:
    done = run(*RAYPROJ, "submit", "--dry-run", "jobs/generate.py", "configs/generate.yaml", "run.seed=3")
    assert done.returncode == 0
    assert "python jobs/generate.py configs/generate.yaml run.seed=3" in done.stdout and "MiB" in done.stdout


def test_a_folder_too_large_for_ray_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    for name in ("jobs/j.py", "c.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with open(tmp_path / "huge.bin", "wb") as file:
        file.truncate(120 << 20)
    (tmp_path / ".venv").mkdir()
    with open(tmp_path / ".venv" / "excluded.bin", "wb") as file:
        file.truncate(500 << 20)
    done = run(*RAYPROJ, "submit", "jobs/j.py", "c.yaml", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "has 120 MiB" in done.stderr and "huge.bin (120 MiB)" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["jobs/none.py", "configs/generate.yaml"], "'jobs/none.py' is not a file below"),
        (["jobs/generate.py", "configs/generate.yaml"], "Give the cluster's dashboard"),
        (["jobs/generate.py", "configs/generate.yaml", "--address", "http://127.0.0.1:9"], "No Ray dashboard answers"),
    ],
)
def test_what_cannot_be_submitted(words: list[str], says: str) -> None:
    done = run(*RAYPROJ, "submit", *words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
