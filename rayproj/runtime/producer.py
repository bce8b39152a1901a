"""A pool of actors that makes every planned shard of a dataset exactly once, and of the next dataset."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from rayproj import faults
from rayproj.config import below
from rayproj.data import watermark
from rayproj.data.dataset import Dataset
from rayproj.data.writer import commit_shard
from rayproj.errors import Interrupted, UserError
from rayproj.runtime import interrupt
from rayproj.runtime.group import import_entry, set_environment
from rayproj.runtime.leases import Leases, PoisonShard, slowest
from rayproj.runtime.run import Run


@dataclass
class PoolConfig:
    """How many makers, and what each gets."""

    actors: int = 2
    cpus_per_actor: float = 0.5
    gpus_per_actor: float | None = None  # None: one where the cluster has GPUs, else none
    max_ahead: int = 64  # shards that may be made beyond what the slowest consumer has read
    lease_seconds: float = 600.0  # after which a shard is given to somebody else too

    def problems(self) -> list[str]:
        positive = ("actors", "max_ahead", "lease_seconds")
        found = [f"pool.{k} must be positive." for k in positive if getattr(self, k) <= 0]
        return found + below(0, "pool", self, "cpus_per_actor", "gpus_per_actor")


class _Maker:
    """Builds a dataset's maker once, then makes and commits one of its shards a call."""

    def __init__(self, name: str, threads: int, folder: str) -> None:
        set_environment(threads, folder)
        self.name, self.threads = name, threads

    def start(self, maker: str, config: dict[str, Any], uri: str) -> None:
        """Build the maker; not in `__init__`, of whose errors Ray keeps the text alone."""
        import torch

        torch.set_num_threads(self.threads)
        self.maker: Any = None  # of the dataset before: two would not always fit
        on_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        self.dataset = Dataset.open(uri)
        self.maker = import_entry(maker)(config, "cuda:0" if on_gpu else "cpu")

    def make(self, shard: int) -> tuple[str, float, float]:
        """Returns who made it, when it began and when it was committed (unix time)."""
        began = time.time()
        samples = self.maker.make(shard)
        commit_shard(self.dataset, shard, samples, self.name, time.time() - began)
        return self.name, began, time.time()


class Pool:
    """Actors that make one dataset after another: starting them costs seconds of imports. One that Ray has no room for yet
    waits for a node, and is given nothing.

    Attributes:
        actors: by name.
        busy: what each call is for: an actor, and its shard; None while it builds its maker.
        failed_starts: in a row.
    """

    def __init__(self, run: Run, config: PoolConfig) -> None:
        gpus = config.gpus_per_actor
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        self._actor = ray.remote(num_cpus=config.cpus_per_actor, num_gpus=gpus, max_restarts=0)(_Maker)
        self._label = f"{run.id} {{}} ({uuid.uuid4().hex[:8]})"
        self._place = (max(1, int(config.cpus_per_actor)), os.getcwd())
        self.run, self.config = run, config
        self._task: tuple[Any, ...] = ()
        self._ready: set[str] = set()  # names of the actors that have, or are building, the maker of this task
        self._started = self.failed_starts = 0
        self.actors: dict[str, Any] = {}
        self.busy: dict[ray.ObjectRef, tuple[str, int | None]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.actors):
            self.drop(name)

    def begin(self, maker: str, values: dict[str, Any], uri: str) -> None:
        """From here on shards of this dataset."""
        self.settle()
        self._task, self._ready, self.failed_starts = (maker, values, uri), set(), 0

    def settle(self) -> None:
        """Nobody waits for who is still at something: another has made it."""
        for name in {holder for holder, _ in self.busy.values()}:
            self.drop(name)
        self.busy = {}

    def idle(self) -> list[str]:
        """Names of the actors with nothing to do, after replacing those that were lost."""
        while len(self.actors) < self.config.actors:
            name = f"maker {self._started}"
            self._started += 1
            self.actors[name] = self._actor.options(name=self._label.format(name)).remote(name, *self._place)  # type: ignore[attr-defined]
        for name in self.actors.keys() - self._ready:
            self.busy[self.actors[name].start.remote(*self._task)] = (name, None)
            self._ready.add(name)
        return [name for name in self.actors if name not in {holder for holder, _ in self.busy.values()}]

    def give(self, name: str, shard: int) -> None:
        self.busy[self.actors[name].make.remote(shard)] = (name, shard)

    def drop(self, name: str) -> None:
        ray.kill(self.actors.pop(name), no_restart=True)

    def produce(
        self,
        dataset: Dataset,
        maker: str,
        values: dict[str, Any],
        consumers: list[str] | None = None,
        together: int = 1,
    ) -> dict[str, Any]:
        """Make every planned shard of `dataset` that is not committed yet.

        Args:
            maker: "package.module:Class"; `Class(values, device)` is built once in each actor, and its `.make(shard)`
                returns the shard's samples.
            consumers: trainings that read meanwhile; no shard is begun too far ahead of the slowest.
            together: shards in a row that are best made by one maker.

        Raises:
            Interrupted: a stop was asked for; what is committed stays.
            UserError: from a maker.
            PoisonShard: shards failed again and again; all others are made.
            RuntimeError: no maker can be started.
        """
        consumers, run, config = consumers or [], self.run, self.config
        leases = Leases(
            dataset.header.num_shards,
            config.lease_seconds,
            config.max_ahead if consumers else None,
            together=together,
            done=set(dataset.records()),
        )
        self.begin(maker, values, dataset.uri)
        run.tracker.event({"type": "total", "steps": dataset.header.num_shards})
        made, began, counted, last = 0, time.time(), 0, ""
        while not leases.complete:
            interrupt.check()
            if run.stop_wished():
                raise Interrupted
            consumed = slowest(watermark.watermarks(dataset), consumers) if consumers else 0
            for name in self.idle():
                shard = leases.grant(name, time.monotonic(), consumed)
                if shard is not None:
                    faults.maybe("lease.before_give")
                    self.give(name, shard)
                    faults.maybe("lease.after_give")
            if leases.aside and not leases.held and self.idle():
                break  # a consumer waits for what cannot be made
            done, _ = ray.wait(list(self.busy), timeout=0.2) if self.busy else ([], [])
            if not done:
                time.sleep(0 if self.busy else 0.1)
            for ref in done:
                name, shard = self.busy.pop(ref)
                try:
                    span = ray.get(ref)
                except UserError as error:
                    raise UserError(*error.args) from error
                except Interrupted:
                    raise
                except Exception as error:
                    last = _lost(run, self, leases, name, shard, error)
                    continue
                if shard is None:
                    self.failed_starts = 0
                    continue
                faults.maybe("lease.before_finish")
                new = leases.finish(shard, time.monotonic())
                faults.maybe("lease.after_finish")
                if new:  # a late maker's shard may have been made by another
                    made += 1
                    counted += len(dataset.header.shard_range(shard))
                    _report(run, leases, shard, span, counted / (time.time() - began), counted)
        if leases.aside:
            raise PoisonShard(
                f"{_named(leases.aside)} failed {leases.max_tries} times; {len(leases.done)} of {leases.num_shards} are "
                f"committed, and the same command tries the rest again. The last maker {last}"
            )
        self.settle()
        for path in dataset.orphans():  # nobody adds to it any more
            dataset.store.delete_tree(path)
        seconds = time.time() - began
        return {
            "samples": dataset.header.num_samples,
            "shards": dataset.header.num_shards,
            "made": made,
            "images_per_second": counted / seconds if made else _recorded_speed(dataset),
            "dataset": dataset.uri,
            "manifest": dataset.manifest_hash(),
        }


def produce(
    run: Run,
    dataset: Dataset,
    maker: str,
    config: PoolConfig,
    values: dict[str, Any],
    consumers: list[str] | None = None,
    together: int = 1,
) -> dict[str, Any]:
    """`Pool.produce` by a pool for this dataset alone."""
    with Pool(run, config) as pool:
        return pool.produce(dataset, maker, values, consumers, together)


def _lost(run: Run, pool: Pool, leases: Leases, name: str, shard: int | None, error: Exception) -> str:
    """A maker died or failed; returns how.

    Raises:
        RuntimeError: so have all that were started before it.
    """
    what = "died" if isinstance(error, RayActorError) else f"failed: {str(error).strip().splitlines()[-1]}"
    goes = "another is started" if shard is None else f"shard {shard} goes to another"
    run.tracker.event({"type": "restart", "cause": what, "text": f"{name} {what}; {goes}."})
    leases.lose(name, shard)
    pool.drop(name)
    pool.failed_starts += shard is None
    if pool.failed_starts >= leases.max_tries:
        raise RuntimeError(
            f"{pool.failed_starts} makers in a row could not be started; the last one {what}."
        ) from error
    return what


def _named(shards: set[int]) -> str:
    names = ", ".join(map(str, sorted(shards)[:8]))
    return f"Shard {names}" if len(shards) == 1 else f"{len(shards)} shards ({names}{', ...' * (len(shards) > 8)})"


def _report(run: Run, leases: Leases, shard: int, span: tuple[str, float, float], speed: float, samples: int) -> None:
    actor, start, end = span
    run.tracker.event({"type": "span", "actor": actor, "what": f"shard {shard}", "start": start, "end": end})
    busy = len(leases.held)
    waiting = leases.num_shards - len(leases.done) - busy
    values = {"samples": samples, "images_per_second": speed, "queue_busy": busy, "queue_waiting": waiting}
    run.tracker.event({"type": "metrics", "step": len(leases.done), **values})


def _recorded_speed(dataset: Dataset) -> float:
    """Samples per second by the records, where this process made nothing itself."""
    records = dataset.records().values()
    ends = [r.committed_at for r in records]
    begins = [r.committed_at - r.seconds for r in records]
    return sum(r.samples for r in records) / max(1e-9, max(ends) - min(begins))
