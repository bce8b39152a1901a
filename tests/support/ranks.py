"""Run a function on several gloo ranks, each its own process, as the runtime does but without Ray.

The processes are forked from a server that has torch and DeepSpeed imported already, which saves each of them seconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "call.pickle").write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
        arguments = [(name, rank, world_size, env or {}) for rank in range(world_size)]
        processes = [context.Process(target=_rank, args=a) for a in arguments]
        path = sys.path[:]
        sys.path.insert(0, str(ROOT))  # handed to the processes
        for process in processes:
            process.start()
        sys.path[:] = path
        for process in processes:
            process.join(timeout=240)
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        if check and any(codes):
            raise AssertionError("\n".join((folder / f"stderr-{r}").read_text() for r in range(world_size)))
        return [
            pickle.loads((folder / f"result-{rank}").read_bytes()) if code == 0 else code
            for rank, code in enumerate(codes)
        ]


def _rank(name: str, rank: int, world_size: int, env: dict[str, str]) -> None:
    folder = Path(name)
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(ROOT)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in place.items()} | env)
    import torch
    import torch.distributed as dist

    from rayproj.engine.world import World

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    module, function, args = pickle.loads((folder / "call.pickle").read_bytes())
    result = getattr(importlib.import_module(module), function)(World(rank, world_size, rank, "cpu"), *args)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
    os._exit(0)  # torch's own threads now and then abort the interpreter's exit, long after anything of ours
