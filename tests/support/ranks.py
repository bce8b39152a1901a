"""Run a function on several gloo ranks, each its own process, as the runtime does but without Ray."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, env: dict[str, str] | None = None, check: bool = True
) -> list[Any]:
    """Call `function(world, *args)` on every rank; returns what each rank returned.

    With `check=False` a rank that died has its (negative) exit code in place of a result.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = Path(folder) / "call.pickle"
        call.write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, "-m", "tests.support.ranks", folder]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(world_size)],
                cwd=ROOT,
                env=environment,
                stderr=open(Path(folder) / f"stderr-{rank}", "w"),
            )
            for rank in range(world_size)
        ]
        codes = [process.wait(timeout=240) for process in processes]
        if check and any(codes):
            raise AssertionError("\n".join((Path(folder) / f"stderr-{r}").read_text() for r in range(world_size)))
        return [
            pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) if code == 0 else code
            for rank, code in enumerate(codes)
        ]


def _rank(folder: Path, rank: int, world_size: int) -> None:
    import importlib

    import torch
    import torch.distributed as dist

    from rayproj.engine.world import World

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world_size))
    store = dist.FileStore(str(folder / "rendezvous"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    module, name, args = pickle.loads((folder / "call.pickle").read_bytes())
    result = getattr(importlib.import_module(module), name)(World(rank, world_size, rank, "cpu"), *args)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
