"""A driver of one rank group on the cluster of RAY_ADDRESS: `python -m tests.support.drive ENTRY key=value ...`"""

import sys
from typing import Any

from omegaconf import OmegaConf

from rayproj import config as configuration
from rayproj.runtime.command import run_guarded
from rayproj.runtime.run import Run
from rayproj.runtime.supervisor import fit
from tests.support.entries import RunOnly


def main(config: RunOnly) -> dict[str, Any]:
    with Run.open("test", config) as run:
        worlds = [n for n in range(1, 13) if 12 % n == 0]
        return run.result or run.finish(fit(run, entry, config.cluster, worlds))


if __name__ == "__main__":
    entry, *overrides = sys.argv[1:]
    values = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    raise SystemExit(run_guarded(lambda: configuration.from_dict(RunOnly, values), main))
