"""A real Ray head with its dashboard, and jobs handed to it both ways."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from rayproj import cli
from rayproj.engine.checkpoint import commits, load_ema
from rayproj.errors import UserError
from rayproj.runtime.submit import Request, check
from rayproj.storage.store import Store
from tests.support import images
from tests.support.commands import ROOT, environment, run

RAYPROJ = [sys.executable, "-m", "rayproj.cli"]
FAILING = [*RAYPROJ, "submit", "jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", "data=/nowhere"]


def free_port(low: int = 6400, high: int = 9900) -> int:
    """A port outside Ray's workers' range, 10002 to 19999."""
    for port in range(low + os.getpid() % 500, high):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


class Head:
    """A head with its dashboard, by cluster/local.sh; only its own processes are ended."""

    def __init__(self, **extra: str) -> None:
        gcs = free_port()
        dashboard, client, agent = (free_port(gcs + step) for step in (1, 10, 20))
        self.folder = tempfile.mkdtemp(prefix="rp", dir="/tmp")  # Ray's sockets need a short path
        self.command = [str(ROOT / "cluster" / "local.sh"), str(gcs), str(dashboard), "--num-cpus=2"]
        self.command += [f"--ray-client-server-port={client}", f"--temp-dir={self.folder}"]
        # Of two heads on one machine only one could have the agent's usual port, and without an agent there are no jobs.
        self.command += [f"--dashboard-agent-listen-port={agent}"]
        # An empty PYTHONPATH: the job's working directory alone must be enough.
        self.env = environment(PYTHONPATH="", **extra)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.start()

    def start(self) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, env=self.env, start_new_session=True, **quiet)  # type: ignore
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.address}/api/version", timeout=2)
                break
            except urllib.error.HTTPError:  # it wants a token
                break
            except OSError:
                time.sleep(0.5)

    def kill(self) -> None:
        """As a power cut: all that it had started is gone."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, as the head fell apart
                process.kill()
        self.process.wait()

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a dashboard."""
    found = Head()
    yield found.address
    found.end()


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

    failed = run(*FAILING, f"run.dir={tmp_path}/failed", "--address", head, "--follow")
    assert failed.returncode == 2 and "There is no dataset at '/nowhere'" in failed.stdout


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_head_that_dies_and_comes_back_gets_the_job_again(tmp_path: Path) -> None:
    """With its head die the driver and the ranks; what is left is the store. The end is that of a quiet run, bit by bit."""
    images.write(str(tmp_path / "data"), num_samples=64)
    words = [f"data={tmp_path}/data", "train.steps=60", "train.batch=8", "autoencoder.channels=[8,8,8]"]
    words += ["train.checkpoint.every_steps=5", "train.log_every=5"]
    lost, quiet = Store(str(tmp_path / "lost")), Store(str(tmp_path / "quiet"))
    head = Head()
    try:
        command = [*RAYPROJ, "submit", "jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", *words]
        submit = subprocess.Popen(
            [*command, f"run.dir={lost.uri}", "--address", head.address, "--retries", "1"],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not commits(lost):
            assert time.monotonic() < deadline and submit.poll() is None
            time.sleep(0.02)
        head.kill()
        reached = commits(lost)[-1].step
        assert reached < 60 and not lost.exists("result.json")
        head.start()
        said, _ = submit.communicate(timeout=150)
        assert submit.returncode == 0, said
    finally:
        head.end()
    assert "lost with its head" in said and "is sent again, and goes on from its last commit" in said
    assert int(re.search(r"going on from step (\d+)", said)[1]) >= reached  # type: ignore[index]
    assert json.loads(lost.read("result.json"))["restarts"] == {"driver lost": 1}
    done = run(sys.executable, *command[4:], f"run.dir={quiet.uri}")
    assert done.returncode == 0, done.stderr
    first, second = load_ema(lost)[0], load_ema(quiet)[0]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_with_a_token(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-0123456789"}
    head = Head(**token)
    try:
        without = run(*FAILING, "--address", head.address, "--follow", HOME=str(tmp_path))
        assert without.returncode == 2 and "wants its token; set RAY_AUTH_MODE=token" in without.stderr
        wrong = run(*FAILING, "--address", head.address, **token | {"RAY_AUTH_TOKEN": "another"})
        assert wrong.returncode == 2 and "wants its token" in wrong.stderr
        # That the job's driver and its Ray have the token shows in the job's own error, which comes after connecting.
        missing = ["submit", "jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", f"data={tmp_path}/none"]
        right = run(*RAYPROJ, *missing, f"run.dir={tmp_path}/run", "--address", head.address, "--follow", **token)
        assert right.returncode == 2 and "There is no dataset at" in right.stdout, right.stdout + right.stderr
    finally:
        head.end()


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # which submit sets
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


@pytest.mark.usefixtures("checkout")
def test_a_dry_run_says_what_would_be_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--dry-run", "jobs/generate.py", "configs/generate.yaml", "run.seed=3"]) == 0
    said = capsys.readouterr().out
    assert "python jobs/generate.py configs/generate.yaml run.seed=3" in said and "MiB" in said


def write_job(folder: Path) -> None:
    for name in ("jobs/j.py", "c.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")


def test_a_folder_too_large_for_ray_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    write_job(tmp_path)
    with open(tmp_path / "huge.bin", "wb") as file:
        file.truncate(120 << 20)
    (tmp_path / ".venv").mkdir()
    with open(tmp_path / ".venv" / "excluded.bin", "wb") as file:
        file.truncate(500 << 20)
    with pytest.raises(UserError, match=r"has 120 MiB.*huge\.bin \(120 MiB\)"):
        check(Request("jobs/j.py", "c.yaml", [], tmp_path))


def test_keys_stay_here_and_a_job_that_needs_one_says_so(tmp_path: Path) -> None:
    write_job(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "watermark").write_bytes(bytes(32))
    plain = Request("jobs/j.py", "c.yaml", [], tmp_path, {"out": "runs/new", "prompts": ["c.yaml", ""]})
    assert set(check(plain)) == {"jobs/j.py", "c.yaml"}
    marked = {"generate": [{"watermark": {"key": "secret/watermark"}}]}
    with pytest.raises(UserError, match="'secret/watermark' is not sent; put it on every node"):
        check(dataclasses.replace(plain, values=marked))
    everywhere = {"key": str(tmp_path / "secret" / "watermark")}
    assert check(dataclasses.replace(plain, values=everywhere))
    assert "/secret/" in (ROOT / ".gitignore").read_text().split()


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["jobs/none.py", "configs/generate.yaml"], "'jobs/none.py' is not a file below"),
        (["jobs/generate.py", "configs/none.yaml"], "'configs/none.yaml' does not exist"),
        (
            ["jobs/generate.py", "configs/generate.yaml", "generate.bach=3", "--dry-run"],
            "did you mean 'generate.batch'?",
        ),
        (["jobs/generate.py", "configs/generate.yaml"], "Give the cluster's dashboard"),
        (["jobs/generate.py", "configs/generate.yaml", "--address", "http://127.0.0.1:9"], "No Ray dashboard answers"),
    ],
)
def test_what_cannot_be_submitted(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", *words]) == 2
    assert says in capsys.readouterr().err
