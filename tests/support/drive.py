"""A driver of one rank group on the cluster of RAY_ADDRESS: `python -m tests.support.drive ENTRY key=value ...`

With RAYPROJ_TEST_HOLD it waits once, between the placement of its ranks and their start, until that file is removed.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rayproj import config as configuration
from rayproj.runtime import supervisor
from rayproj.runtime.command import run_guarded
from rayproj.runtime.run import Run
from rayproj.runtime.supervisor import fit
from tests.support.entries import RunOnly


def main(config: RunOnly) -> dict[str, Any]:
    with Run.open("test", config) as run:
        worlds = [n for n in range(1, 13) if 12 % n == 0]
        return run.result or run.finish(fit(run, entry, config.cluster, worlds))


def hold(file: Path) -> None:
    place = supervisor.place

    def place_and_wait(*args: Any, **kwargs: Any) -> Any:
        supervisor.place, placed = place, place(*args, **kwargs)
        file.touch()
        while file.exists():
            time.sleep(0.02)
        return placed

    supervisor.place = place_and_wait


if __name__ == "__main__":
    if "RAYPROJ_TEST_HOLD" in os.environ:
        hold(Path(os.environ["RAYPROJ_TEST_HOLD"]))
    entry, *overrides = sys.argv[1:]
    values = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    raise SystemExit(run_guarded(lambda: configuration.from_dict(RunOnly, values), main))
