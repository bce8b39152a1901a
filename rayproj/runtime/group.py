"""A group of rank actors that live and die together."""

from __future__ import annotations

import importlib
import os
import queue
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayproj.engine.world import World
from rayproj.runtime.placement import place


@dataclass
class GroupConfig:
    """How many ranks, and what each of them gets."""

    ranks: int = 1
    cpus_per_rank: float = 1.0
    gpus_per_rank: float | None = None  # None: one where the cluster has GPUs, else none
    start_timeout: float = 300.0  # seconds to wait for the cluster to have room
    max_failures: int = 3  # restarts in a row without a new commit in between

    def problems(self) -> list[str]:
        return [] if self.ranks >= 1 else [f"cluster.ranks must be at least 1, not {self.ranks}."]


def import_entry(entry: str) -> Callable[..., Any]:
    """The object that "package.module:name" names."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


class ActorLink:
    """A rank's line to the driver: a queue that the driver drains, and a wish to stop."""

    def __init__(self, attempt: str) -> None:
        self.attempt = attempt
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.stop = threading.Event()

    def report(self, event: dict[str, Any]) -> None:
        self.events.put(event)

    def stop_requested(self) -> bool:
        return self.stop.is_set()


def set_environment(threads: int, folder: str) -> None:
    """What torch and DeepSpeed read from the environment; before either is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if os.path.isdir(folder):
        os.chdir(folder)  # relative paths of a config mean the driver's folder


class _Rank:
    """One rank. `run` occupies the actor's own thread; the rest answers meanwhile."""

    def __init__(self, attempt: str, threads: int, folder: str) -> None:
        set_environment(threads, folder)
        self.threads = threads
        self.link = ActorLink(attempt)

    def serve(self) -> tuple[str, int]:
        """Rank 0 opens the rendezvous on a port that the kernel chooses, and keeps it: no race for a free port."""
        from torch.distributed import TCPStore

        self.store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return ray.util.get_node_ip_address(), self.store.port

    def run(
        self,
        entry: str,
        config: dict[str, Any],
        rank: int,
        world_size: int,
        local: tuple[int, int],
        host: str,
        port: int,
    ) -> Any:
        local_rank, local_size = local
        on_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        # Ray shows a process its own GPUs alone, so there the local rank is 0.
        local_rank = 0 if on_gpu else local_rank
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(local_rank),
            LOCAL_WORLD_SIZE=str(local_size),
            LOCAL_SIZE=str(local_size),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        import torch
        import torch.distributed as dist

        torch.set_num_threads(self.threads)
        store = self.store if rank == 0 else dist.TCPStore(host, port, is_master=False)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
        )
        world = World(rank, world_size, local_rank, "cuda:0" if on_gpu else "cpu")
        return import_entry(entry)(config, world, self.link)

    @ray.method(concurrency_group="control")
    def poll(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        found = []
        while not self.link.events.empty():
            found.append(self.link.events.get())
        return found

    @ray.method(concurrency_group="control")
    def request_stop(self) -> None:
        self.link.stop.set()


class RankGroup:
    """N gang-scheduled actors running one entry. Never repaired: a group that lost a rank is killed and another made.

    Raises (on construction):
        UserError: the cluster has no room for it in time.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.attempt = uuid.uuid4().hex[:8]
        gpus = config.gpus_per_rank
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        self.placement, order = place(config.ranks, config.cpus_per_rank, gpus, config.start_timeout)
        actor = ray.remote(concurrency_groups={"control": 2})(_Rank)  # type: ignore[call-overload]
        self.locals = [(local, 1 + max(local for _, local in order)) for _, local in order]
        self.actors = [
            actor.options(
                num_cpus=config.cpus_per_rank,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, bundle),
            ).remote(self.attempt, max(1, int(config.cpus_per_rank)), os.getcwd())
            for bundle, _ in order
        ]

    def start(self, entry: str, config: dict[str, Any]) -> list[ray.ObjectRef]:
        """Call `entry(config, world, link)` on every rank; the refs are of what the ranks return."""
        host, port = ray.get(self.actors[0].serve.remote())
        return [
            actor.run.remote(entry, config, rank, len(self.actors), self.locals[rank], host, port)
            for rank, actor in enumerate(self.actors)
        ]

    def poll(self) -> list[dict[str, Any]]:
        """New events of all ranks; a rank that does not answer has none."""
        refs = [actor.poll.remote() for actor in self.actors]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=5)
        events: list[dict[str, Any]] = []
        for ref in ready:
            try:
                events += ray.get(ref)
            except ray.exceptions.RayActorError:
                continue
        return events

    def request_stop(self) -> None:
        for actor in self.actors:
            actor.request_stop.remote()

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self.placement)
