"""What a scraper of a real Ray's metrics finds."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TRACKED = """
import sys, ray
from rayproj.storage.store import Store
from rayproj.tracking.tracker import Tracker, TrackingConfig, WandbMode
port = int(sys.argv[2])
if port:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
tracker = Tracker("déjà-train", "train", Store(sys.argv[1]), TrackingConfig(wandb=WandbMode.disabled), {})
tracker.start()
tracker.event({"type": "resumed", "step": 0, "ranks": 3})
tracker.event({"type": "metrics", "step": 1, "loss": 9.0, "step_seconds": 0.5})
tracker.event({"type": "metrics", "step": 2, "loss": 0.125, "step_seconds": 0.5, "not_shown": 1.0})
for cause in ("hang", "node lost", "hang"):
    tracker.event({"type": "restart", "cause": cause, "text": "again"})
print("tracked", ray.is_initialized(), flush=True)
sys.stdin.readline()
tracker.close()
"""


def start(folder: Path, port: int) -> subprocess.Popen:  # type: ignore[type-arg]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_metrics_report_interval_ms": "300"}
    env.pop("RAY_ADDRESS", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", TRACKED, str(folder), str(port)], cwd=ROOT, text=True, env=env, **pipes
    )


def scrape(port: int) -> dict[tuple[str, str, str, str], float]:
    """Values of ray_rayproj_* by name, run, job and cause."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        if match := re.fullmatch(r"ray_rayproj_(\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            found[match[1], labels.get("run", ""), labels.get("job", ""), labels.get("cause", "")] = float(match[3])
    return found


def test_a_scraper_finds_the_last_values_and_the_restarts_by_cause(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = "d?j?-train"
    expected = {
        **{(name, run, "train", ""): value for name, value in {"step": 2, "loss": 0.125, "ranks": 3}.items()},
        ("restarts_total", run, "train", "hang"): 2.0,
        ("restarts_total", run, "train", "node lost"): 1.0,
    }
    found: dict[tuple[str, str, str, str], float] = {}
    with start(tmp_path, port) as process:
        try:
            assert process.stdout.readline() == "tracked True\n"
            deadline = time.monotonic() + 60
            while not expected.items() <= found.items() and time.monotonic() < deadline:
                time.sleep(0.2)
                found = scrape(port)
        finally:
            process.communicate("\n", timeout=60)
    assert expected.items() <= found.items(), found
    assert not any(name == "not_shown" for name, *_ in found)
    assert 0 < found["goodput", run, "train", ""] <= 1
    assert process.returncode == 0


def test_without_ray_there_is_nothing_to_export_and_nothing_happens(tmp_path: Path) -> None:
    with start(tmp_path, 0) as process:
        out, _ = process.communicate("\n", timeout=60)
    assert out == "tracked False\n" and process.returncode == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
