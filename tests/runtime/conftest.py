"""One embedded Ray for the tests of the runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from tests.support.entries import RunOnly

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    from rayproj.runtime.cluster import connect

    # Workers import `tests.support`, which only a checkout has.
    os.environ["PYTHONPATH"] = str(ROOT)
    connect()
    yield
    ray.shutdown()


@pytest.fixture
def open_run(tmp_path: Path) -> Any:
    def make(ranks: int = 2, **group: Any) -> Any:
        config = RunOnly(run=RunConfig(dir=str(tmp_path / "run")), cluster=GroupConfig(ranks=ranks, **group))
        return Run.open("test", config)

    return make
