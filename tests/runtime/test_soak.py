"""Ten minutes of random kills: `RAYPROJ_SOAK_SECONDS=600 python -m pytest -m slow tests/runtime/test_soak.py`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from tests.support import images
from tests.support.commands import ROOT, environment

SECONDS = float(os.environ.get("RAYPROJ_SOAK_SECONDS", 600))
PAUSE = 0.4  # seconds that a shard takes


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS + 600)
def test_makers_and_drivers_that_die_again_and_again_leave_exactly_what_was_planned(tmp_path: Path) -> None:
    rng, samples = random.Random(0), 4 * int(SECONDS)  # some 0.3 s each on two cores, with all that dies
    killed = {"maker": 0, "driver": 0}
    command = [sys.executable, "-m", "tests.support.produce", str(tmp_path), str(samples), str(PAUSE)]
    deadline = time.monotonic() + 3 * SECONDS
    while not (tmp_path / "run" / "result.json").exists():
        assert time.monotonic() < deadline, f"it does not end; killed {killed}"
        driver = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        until = time.monotonic() + rng.uniform(20, 60)
        while driver.poll() is None and time.monotonic() < until:
            time.sleep(rng.expovariate(1 / 3))
            pids = [int(path.name.removeprefix("maker-")) for path in tmp_path.glob("maker-*")]
            alive = [pid for pid in pids if psutil.pid_exists(pid)]
            if alive and driver.poll() is None:
                os.kill(rng.choice(alive), signal.SIGKILL)
                killed["maker"] += 1
        if driver.poll() is None:
            driver.kill()
            killed["driver"] += 1
        driver.communicate()
    assert killed["maker"] > SECONDS / 10 and killed["driver"] >= SECONDS / 120, killed
    dataset = Dataset.open(str(tmp_path / "data"))
    assert dataset.complete and {r.object for r in dataset.records().values()} == set(dataset.store.list("shards"))
    found = Reader(dataset).gather(np.arange(samples))
    expected = [images.sample(i) for i in range(samples)]
    for name in ("image", "label", "note", "z"):
        assert all(np.array_equal(value, one[name]) for value, one in zip(found[name], expected, strict=True))
