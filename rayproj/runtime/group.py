"""A group of rank actors that live and die together."""

from __future__ import annotations

import importlib
import os
import queue
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayproj.config import below
from rayproj.engine.world import World
from rayproj.runtime.placement import Placed
from rayproj.runtime.policy import RetryConfig

FATE_SECONDS = 60.0  # Ray takes a node for dead after 5 to 30 seconds without a sign of it


@dataclass
class GroupConfig:
    """How many ranks, and what each of them gets."""

    ranks: int = 1  # 0: one, in the driver's own process, for a run that is over sooner than processes start
    cpus_per_rank: float = 1.0
    gpus_per_rank: float | None = None  # None: one where the cluster has GPUs, else none
    start_timeout: float = 300.0  # seconds to wait for the cluster to have room
    # After a node was lost: seconds to wait for another, before the run goes on with fewer ranks.
    shrink_after: float = 60.0
    min_ranks: int = 0  # never fewer; 0: all of them at the start, and any number after a node was lost
    retry: RetryConfig = field(default_factory=RetryConfig)

    def problems(self) -> list[str]:
        names = ("ranks", "cpus_per_rank", "gpus_per_rank", "start_timeout", "shrink_after", "min_ranks")
        found = below(0, "cluster", self, *names)
        if self.min_ranks > max(0, self.ranks):
            found.append("cluster.min_ranks must not exceed cluster.ranks.")
        return found


def import_entry(entry: str) -> Callable[..., Any]:
    """The object that "package.module:name" names."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


class ActorLink:
    """A rank's line to the driver: a queue that the driver drains, signs of life, and a wish to stop."""

    def __init__(self, attempt: str) -> None:
        self.attempt = attempt
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.beats, self.step = 0, None

    def beat(self, step: int | None) -> None:
        self.beats, self.step = self.beats + 1, step  # type: ignore[assignment]

    def report(self, event: dict[str, Any]) -> None:
        self.events.put(event)

    def stop_requested(self) -> bool:
        self.beats += 1  # who asks, lives: a rank that waits for data asks again and again
        return self.stop.is_set()


def set_environment(threads: int, folder: str) -> None:
    """What torch and DeepSpeed read from the environment; before either is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if os.path.isdir(folder):
        os.chdir(folder)  # relative paths of a config mean the driver's folder


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has an address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(one.address == address for one in found)), None)


class _Rank:
    """One rank. `run` occupies the actor's own thread; the rest answers meanwhile."""

    def __init__(self, attempt: str, threads: int, folder: str) -> None:
        set_environment(threads, folder)
        import torch  # noqa: F401  here, so that all ranks spend this second at once, and not after the rendezvous

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
        # Gloo would take the interface of this machine's name, which often is the loopback; no other node reaches that.
        if interface := interface_of(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(self.threads)  # of this thread, which is not the one that made the actor
        store = self.store if rank == 0 else dist.TCPStore(host, port, is_master=False)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
        )
        world = World(rank, world_size, local_rank, "cuda:0" if on_gpu else "cpu")
        return import_entry(entry)(config, world, self.link)

    @ray.method(concurrency_group="control")
    def poll(self) -> tuple[list[dict[str, Any]], int, int | None]:
        """The events since the last call, the number of signs of life, and the last step that was done."""
        found = []
        while not self.link.events.empty():
            found.append(self.link.events.get())
        return found, self.link.beats, self.link.step

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        """What every thread of this process is at."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(
            f"--- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        )

    @ray.method(concurrency_group="control")
    def request_stop(self) -> None:
        self.link.stop.set()


class RankGroup:
    """N gang-scheduled actors running one entry. Never repaired: a group that lost a rank is killed and another made.

    Attributes:
        attempt: names this start.
        nodes: ids of the nodes that its ranks are on.
    """

    def __init__(self, run_id: str, config: GroupConfig, bundle: dict[str, float], placed: Placed) -> None:
        self.attempt = uuid.uuid4().hex[:8]
        self.placed = placed
        self.nodes = set(placed.nodes)
        actor = ray.remote(concurrency_groups={"control": 2})(_Rank)  # type: ignore[call-overload]
        order = placed.order
        self.locals = [(local, 1 + max(local for _, local in order)) for _, local in order]
        self.actors = [
            actor.options(
                num_cpus=config.cpus_per_rank,
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                name=f"{run_id} rank {rank} ({self.attempt})",
                scheduling_strategy=PlacementGroupSchedulingStrategy(placed.group, index),
            ).remote(self.attempt, max(1, int(config.cpus_per_rank)), os.getcwd())
            for rank, (index, _) in enumerate(order)
        ]
        self._beats = [0] * len(order)

    def serve(self) -> ray.ObjectRef:
        """Rank 0 opens the rendezvous; done as soon as Ray has made its actor."""
        return self.actors[0].serve.remote()

    def start(self, entry: str, config: dict[str, Any], rendezvous: ray.ObjectRef) -> list[ray.ObjectRef]:
        """Call `entry(config, world, link)` on every rank; the refs are of what the ranks return."""
        host, port = ray.get(rendezvous)
        return [
            actor.run.remote(entry, config, rank, len(self.actors), self.locals[rank], host, port)
            for rank, actor in enumerate(self.actors)
        ]

    def poll(self) -> tuple[list[dict[str, Any]], list[int | None]]:
        """New events of all ranks, and the step of every rank that has shown a sign of life since the last call; a rank
        that does not answer has none."""
        events: list[dict[str, Any]] = []
        alive: list[int | None] = []
        for rank, answer in self._ask("poll", timeout=5).items():
            found, beats, step = answer
            events += found
            if beats > self._beats[rank]:
                alive.append(step)
            self._beats[rank] = beats
        return events, alive

    def stacks(self) -> str:
        """What every rank is at, as far as it answers."""
        answers = self._ask("stacks", timeout=10)
        return "\n".join(f"=== rank {rank}\n{answers.get(rank, 'does not answer')}" for rank in range(len(self.actors)))

    def _ask(self, method: str, timeout: float) -> dict[int, Any]:
        """The answers of the ranks that answer in time."""
        refs = {getattr(actor, method).remote(): rank for rank, actor in enumerate(self.actors)}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout)
        answers = {}
        for ref in ready:
            try:
                answers[refs[ref]] = ray.get(ref)
            except ray.exceptions.RayError:
                continue
        return answers

    def deaths(self, errors: list[BaseException]) -> list[BaseException]:
        """How ranks died, where all that is known of one is that it cannot be reached: Ray learns in its own time
        whether that was its process or its node."""
        found: list[BaseException] = []
        unknown = list(self.actors) if any(map(_unreachable, errors)) else []
        deadline = time.monotonic() + FATE_SECONDS
        while unknown and time.monotonic() < deadline:
            for actor in unknown[:]:
                try:
                    ray.get(actor.stacks.remote(), timeout=5)
                    unknown.remove(actor)
                except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
                    time.sleep(0.2)
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                    found.append(error)
                    unknown.remove(actor)
        return found

    def request_stop(self) -> None:
        for actor in self.actors:
            actor.request_stop.remote()

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self.placed.group)


def _unreachable(error: BaseException) -> bool:
    return isinstance(error, ray.exceptions.ActorUnavailableError)
