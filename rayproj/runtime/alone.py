"""A run's entry in the driver's own process, without a rank group: for small runs of which there are many."""

from __future__ import annotations

import os
import threading
import uuid
from typing import Any

import ray
import torch
import torch.distributed as dist

from rayproj.engine.world import World
from rayproj.errors import Interrupted
from rayproj.runtime import interrupt
from rayproj.runtime.group import GroupConfig, import_entry
from rayproj.runtime.run import Run

_turn = threading.Lock()  # torch's random numbers and process group are those of the process


class RunLink:
    """An only rank's line to the driver that it is itself."""

    def __init__(self, run: Run) -> None:
        self.run, self.attempt = run, uuid.uuid4().hex[:8]

    def beat(self, step: int | None) -> None:
        """Nobody watches it."""

    def report(self, event: dict[str, Any]) -> None:
        self.run.tracker.event(event)

    def stop_requested(self) -> bool:
        if self.run.stop_wished():
            interrupt.request()
        return interrupt.requested()


def fit_alone(run: Run, entry: str, config: GroupConfig) -> dict[str, Any]:
    """Run `entry(config, world, link)` here, as the only rank; one at a time. Of what it raises nothing is tried again.

    Returns:
        What the entry returned, the same as on a group of one rank.

    Raises:
        Interrupted: a stop was asked for, and the entry has committed.
    """
    with _turn:
        interrupt.check()
        torch.set_num_threads(max(1, int(config.cpus_per_rank)))  # of this thread
        on_gpu = bool(ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        if not dist.is_initialized():
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", LOCAL_SIZE="1")
            dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        link = RunLink(run)
        found = import_entry(entry)(run.config, World(0, 1, 0, "cuda:0" if on_gpu else "cpu"), link)
        if interrupt.requested():
            raise Interrupted
        return found  # type: ignore[no-any-return]
