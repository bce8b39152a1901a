"""A driver that makes a small dataset on a Ray of its own: `python -m tests.support.produce FOLDER [SAMPLES PAUSE]`."""

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
        header, values, pool = images.header(), {"log": str(folder / "made.log")}, PoolConfig()
        if sys.argv[2:]:
            header, values["pause"] = images.header(int(sys.argv[2]), 2), sys.argv[3]
            pool.cpus_per_actor = 1  # a node of one CPU has room for one
        dataset = Dataset.create(str(folder / "data"), header)
        made = produce(run, dataset, "tests.support.entries:Maker", pool, values)
        run.finish(made)
