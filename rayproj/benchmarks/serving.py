"""The playground under load, batches of many users' images against one image at a time: latencies and images a second.

Each server is a process of its own on this machine, and the two take turns, so that a drift of the machine meets both.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayproj.benchmarks.runtime import Row, row
from rayproj.responsibility.load import PERCENTILES, Load
from rayproj.responsibility.load import measure as under_load

ROUNDS, SECONDS, REQUESTS = 2, 10.0, 400  # rounds; of each measurement the seconds and the requests at most
USERS = (1, 4, 16)
BATCH, THREADS, STEPS = 16, 2, 16
START_SECONDS = 300.0
ROOT = Path(__file__).resolve().parents[2]


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    found: dict[tuple[int, int], list[Load]] = {}
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "rayproj.benchmarks.synthesis", "model", name]
        subprocess.run(command, check=True, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in range(ROUNDS):
            for batch in (BATCH, 1) if number % 2 == 0 else (1, BATCH):
                with _served(folder, batch, f"{batch}-{number}") as url:
                    under_load(url, 1, SECONDS, requests=3)  # what is loaded lazily is loaded
                    for users in USERS:
                        load = under_load(url, users, SECONDS, requests=REQUESTS)
                        found.setdefault((users, batch), []).append(load)
                        print(f"round {number + 1}, batches of {batch}: {load}", file=sys.stderr, flush=True)
    return [line for users in USERS for line in _rows(users, found[users, BATCH], found[users, 1])]


def _rows(users: int, batched: list[Load], single: list[Load]) -> list[Row]:
    what = f"playground, {users} {'user' if users == 1 else 'users'}, {STEPS} steps with guidance, {THREADS} threads"
    peer = "one image at a time"
    speeds = (statistics.median(load.images_per_second for load in loads) for loads in (batched, single))
    ours, theirs = speeds
    rows = [row(f"{what}: images", "1/s", ours, peer, theirs, "higher")]
    for percent in PERCENTILES:
        ours, theirs = (statistics.median(load.percentile(percent) for load in loads) for loads in (batched, single))
        rows.append(row(f"{what}: latency, p{percent}", "s", ours, peer, theirs, "lower"))
    return rows


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "WANDB"))}
    added = {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled"}
    return {**kept, **added, "OMP_NUM_THREADS": str(THREADS)}


@contextmanager
def _served(folder: Path, batch: int, name: str) -> Iterator[str]:
    """The address of a playground, for as long as the block lasts.

    Raises:
        RuntimeError: it does not come up, with what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = {
        "playground.model": folder / "train_diffusion",
        "playground.sampler": json.dumps({"steps": STEPS, "solver": "euler", "guidance": 2.0}),
        "playground.batch": batch,
        "playground.cpus_per_sampler": THREADS,
        "playground.port": port,
        "run.dir": folder / f"playground-{name}",
    }
    job = [str(ROOT / "jobs" / "serve_playground.py"), str(ROOT / "configs" / "serve_playground.yaml")]
    command = [sys.executable, *job, *(f"{key}={value}" for key, value in words.items())]
    said = folder / f"{name}.txt"
    with said.open("w") as out:
        process = subprocess.Popen(command, env=_environment(), stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "The playground is at" not in said.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(said.read_text())
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
