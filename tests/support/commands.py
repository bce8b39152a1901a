"""Run the project's commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """The environment without what a surrounding Ray or W&B would add."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "RAYPROJ_"))}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled", **extra}


def run(*command: str, cwd: Path = ROOT, timeout: float = 280, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout)


def job(name: str, config: Path | str, *overrides: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python jobs/NAME.py CONFIG key=value ...`"""
    return run(sys.executable, f"jobs/{name}.py", str(config), *overrides, **extra)


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a command and of all that it started, at once."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=10)
        process.wait()
