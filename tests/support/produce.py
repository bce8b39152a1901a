"""A driver that makes a small dataset on a Ray of its own: `python -m tests.support.produce FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from rayproj.data.dataset import Dataset
from rayproj.runtime.cluster import connect
from rayproj.runtime.producer import PoolConfig, produce
from rayproj.runtime.run import Run, RunConfig
from tests.support import images
from tests.support.entries import RunOnly

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    connect()
    with Run.open("produce", RunOnly(run=RunConfig(dir=str(folder / "run")))) as run:
        dataset = Dataset.create(str(folder / "data"), images.header())
        made = produce(run, dataset, "tests.support.entries:Maker", PoolConfig(), {"log": str(folder / "made.log")})
        run.finish(made)
