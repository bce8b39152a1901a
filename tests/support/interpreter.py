"""Tests of Triton kernels in its interpreter, which it must be told of before it is imported: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

READY = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
ready = pytest.mark.skipif(not READY, reason="runs in the process that the last test starts")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Python with these words there."""
    root = str(Path(__file__).resolve().parents[2])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=root,
        env={**kept, "TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
    )


def tests(file: str) -> subprocess.CompletedProcess[str]:
    """Run a file of tests there."""
    return run("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
