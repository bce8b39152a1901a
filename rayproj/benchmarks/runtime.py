"""What the runtime costs and what it gives: against a bare DeepSpeed loop under torchrun, DeepSpeed's own checkpoints and
Ray's own pool of actors.

Trainings are whole processes that take turns, so that a drift of the machine meets both: ours is the job as a user starts
it, with Ray, supervision, keyed batches from disk, EMA and metrics; the peer is `rayproj.benchmarks.bare`. Every rank has
one thread.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from rayproj.benchmarks.model import CHANNELS, LATENTS, task, write_latents
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.engine.checkpoint import CheckpointConfig, Saver
from rayproj.engine.engine import Engine, EngineConfig
from rayproj.engine.steps import PlainStep
from rayproj.engine.world import World
from rayproj.runtime.cluster import connect
from rayproj.runtime.producer import PoolConfig, produce
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig, WandbMode

BATCH, WINDOW, WINDOWS, ROUNDS = 64, 10, 9, 3  # examples a rank and step; steps a window; windows and rounds a training
LARGE = (128, 256)  # channels of the model whose checkpoints are measured
SHARDS, MAKERS = 1000, 2

Row = dict[str, Any]


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as name:
        folder = Path(name)
        write_latents(str(folder / "latents"))
        return [*steps(folder), *recovery(folder), *checkpoints(folder), *leases(folder)]


def row(metric: str, unit: str, ours: float, peer: str, value: float, better: str, goal: float | None = None) -> Row:
    found = {"metric": metric, "unit": unit, "ours": ours, "peer": peer, "peer_value": value}
    return found | {"ratio": ours / value, "better": better, "goal": goal}


def in_turns(
    metric: str, ours: Callable[[], Any], peer: str, theirs: Callable[[], Any], rounds: int, times_over: int = 1
) -> Row:
    """Seconds of two ways that take turns in this process, after one round that is not counted.

    Args:
        times_over: how often the peer's time counts, which does but a part of the work.
    """
    found: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for k in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (ours, theirs)[k]()
            found[k].append((time.perf_counter() - began) * (1, times_over)[k])
    times = [values[1:] for values in found]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "metric": metric, "unit": "s", "peer": peer, "better": "lower", "goal": 1.0,
        "ours": statistics.median(times[0]), "peer_value": statistics.median(times[1]), "ratios": ratios,
        "ratio": statistics.median(ratios),
    }  # fmt: skip


class Training(ABC):
    """A training in processes of its own.

    Attributes:
        signs: (step, unix seconds) of each step so far, or of the last of each window.
    """

    def __init__(self, folder: Path, ranks: int, steps: int, every: int = 0, log_every: int = 1) -> None:
        self.folder, self.ranks, self.steps, self.every, self.log_every = folder, ranks, steps, every, log_every
        folder.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "WANDB"))}
        self.process = subprocess.Popen(
            self.command(), env={**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled"},
            stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("w"),
        )  # fmt: skip

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def signs(self) -> list[tuple[int, float]]: ...

    @abstractmethod
    def rank(self) -> psutil.Process:
        """The process of one that is not the first."""

    def wait(self) -> None:
        if self.process.wait():
            raise RuntimeError((self.folder / "stderr").read_text())

    def until(self, happened: Callable[[], Any]) -> Any:
        while not (found := happened()):
            if self.process.poll() is not None:
                raise RuntimeError((self.folder / "stderr").read_text())
            time.sleep(0.01)
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.wait()


class Ours(Training):
    def command(self) -> list[str]:
        words = {
            "diffusion.latents": self.folder.parent / "latents",
            "diffusion.denoiser.channels": f"[{','.join(map(str, CHANNELS))}]",
            "run.dir": self.folder / "run",
            "cluster.ranks": self.ranks,
            "train.batch": BATCH * self.ranks,
            "train.steps": self.steps,
            "train.log_every": self.log_every,
            "train.checkpoint.every_steps": self.every,
            "train.checkpoint.every_seconds": 0,
        }
        config = self.folder / "config.yaml"
        config.write_text("{}")
        return [
            sys.executable,
            "-m",
            "rayproj.jobs.train_diffusion",
            str(config),
            *(f"{k}={v}" for k, v in words.items()),
        ]

    def signs(self) -> list[tuple[int, float]]:
        path = self.folder / "run" / "metrics.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [(row["step"], row["time"]) for row in rows]

    def window_seconds(self) -> list[float]:
        rows = map(json.loads, (self.folder / "run" / "metrics.jsonl").read_text().splitlines())
        return [row["step_seconds"] for row in rows][1:]

    def rank(self) -> psutil.Process:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return next(p for p in reversed(family) if "ray::_Rank" in " ".join(p.cmdline()))


class Bare(Training):
    def command(self) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
        words = [f"--steps={self.steps}", f"--batch={BATCH * self.ranks}", f"--signs={self.folder / 'log'}"]
        if self.every:
            words += [f"--every={self.every}", f"--checkpoint={self.folder / 'checkpoint'}"]
        return [*torchrun, f"--nproc-per-node={self.ranks}", "-m", "rayproj.benchmarks.bare", *words]

    def _lines(self) -> list[list[str]]:
        path = self.folder / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def signs(self) -> list[tuple[int, float]]:
        return [(int(step), float(when)) for step, when, _ in self._lines()]

    def window_seconds(self) -> list[float]:
        ends = [when for step, when in self.signs() if step % WINDOW == 0]
        return [(after - before) / WINDOW for before, after in itertools.pairwise(ends)]

    def rank(self) -> psutil.Process:
        first = int(self._lines()[-1][2])
        workers = psutil.Process(self.process.pid).children()
        return next(p for p in workers if p.pid != first and "bare" in " ".join(p.cmdline()))


def steps(folder: Path) -> list[Row]:
    """Seconds of a step at one rank and at two, each rank with as many examples and one thread."""
    seconds: dict[tuple[type, int], list[float]] = {(kind, ranks): [] for kind in (Ours, Bare) for ranks in (1, 2)}
    for number in range(ROUNDS):
        order = list(seconds) if number % 2 else list(reversed(seconds))
        for kind, ranks in order:
            place = folder / f"{kind.__name__}-{ranks}-{number}"
            training = kind(place, ranks, WINDOW * (WINDOWS + 1), log_every=WINDOW)
            training.wait()
            seconds[kind, ranks].append(statistics.median(training.window_seconds()))
    found = []
    for ranks, goal in ((1, 1.03), (2, None)):
        ours, bare = (statistics.median(seconds[kind, ranks]) for kind in (Ours, Bare))
        what = f"training step, UNet of 0.7 M parameters, batch {BATCH} a rank, {ranks} rank{'s'[: ranks - 1]}"
        made = row(what, "s", ours, "bare DeepSpeed loop under torchrun", bare, "lower", goal)
        # Of each round, because the machine drifts between them.
        ratios = [a / b for a, b in zip(seconds[Ours, ranks], seconds[Bare, ranks], strict=True)]
        found.append(made | {"ratio": statistics.median(ratios), "ratios": ratios})
    efficiency = [
        statistics.median(one / two for one, two in zip(seconds[kind, 1], seconds[kind, 2], strict=True))
        for kind in (Ours, Bare)
    ]
    what = "weak scaling from 1 rank to 2, share of twice the speed"
    return [*found, row(what, "", efficiency[0], "bare DeepSpeed loop under torchrun", efficiency[1], "higher")]


def recovery(folder: Path) -> list[Row]:
    """From kill -9 of one of two ranks to the next step that counts."""
    seconds: dict[type, list[float]] = {Ours: [], Bare: []}
    for number in range(ROUNDS):
        for kind in (Ours, Bare) if number % 2 else (Bare, Ours):
            training = kind(folder / f"killed-{kind.__name__}-{number}", 2, 10_000, every=5)
            try:
                seconds[kind].append(_after_a_kill(training))
            finally:
                training.end()
    ours, bare = (statistics.median(seconds[kind]) for kind in (Ours, Bare))
    return [row("kill -9 of a rank to the next step, 2 ranks", "s", ours, "torchrun --max-restarts", bare, "lower")]


def _after_a_kill(training: Training) -> float:
    training.until(lambda: any(step >= 13 for step, _ in training.signs()))
    training.rank().send_signal(signal.SIGKILL)
    killed = time.time()
    # Steps are logged right up to the kill; the first of the new start comes seconds later.
    again: list[float] = training.until(lambda: [when for _, when in training.signs() if when > killed + 1])
    return again[0] - killed


def checkpoints(folder: Path) -> list[Row]:
    """Seconds that the loop stands still for a checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "rendezvous"), 1), rank=0, world_size=1)
    world = World(0, 1, 0, "cpu")
    engine = Engine(task(LARGE).build(), EngineConfig(), 10_000, world)
    step, batches = PlainStep(8, 0, 1), Batches(Reader(Dataset.open(str(folder / "latents"))), _order(8), 0, 1)
    savers = {
        kind: Saver(engine, Store(str(folder / kind)), kind, CheckpointConfig(asynchronous=kind == "asynchronous"))
        for kind in ("asynchronous", "synchronous")
    }
    stalls: dict[str, list[float]] = {"asynchronous": [], "synchronous": [], "DeepSpeed": []}
    for number in range(6):
        for kind, found in stalls.items():
            for _ in range(8):
                step(engine, task(LARGE), batches.at(engine.step))
            began = time.perf_counter()
            if kind == "DeepSpeed":
                engine.deepspeed.save_checkpoint(str(folder / "deepspeed"), tag=str(number), save_latest=False)
            else:
                savers[kind].save({})
            found.append(time.perf_counter() - began)
            if kind != "DeepSpeed":
                savers[kind].wait()
    dist.destroy_process_group()
    median = {kind: statistics.median(found[1:]) for kind, found in stalls.items()}
    what = f"checkpoint's stall, asynchronous, {sum(engine.sizes.values()) / 1e6:.0f} M parameters, 1 rank"
    return [
        row(what, "s", median["asynchronous"], "ours, synchronous", median["synchronous"], "lower"),
        row(what, "s", median["asynchronous"], "DeepSpeed's save_checkpoint", median["DeepSpeed"], "lower"),
    ]


def _order(batch: int) -> Shuffled:
    return Shuffled(LATENTS.num_samples, LATENTS.shard_size, batch, 0)


@dataclass
class _LeaseConfig:
    run: RunConfig
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(wandb=WandbMode.disabled))


TINY = Header("tiny", {"x": Field("npy", (1,))}, SHARDS, 1, ())


class Maker:
    """A sampler whose work is next to nothing."""

    def __init__(self, config: dict[str, Any], device: str) -> None: ...

    def make(self, shard: int) -> list[dict[str, Any]]:
        return [{"key": f"{shard:08d}", "x": np.zeros(1, np.float32)}]


class PlainMaker(Maker):
    """The same for Ray's pool: makes a shard and commits it."""

    def __init__(self, uri: str) -> None:
        self.dataset = Dataset.open(uri)

    def run(self, shard: int) -> None:
        commit_shard(self.dataset, shard, self.make(shard), "peer", 0.0)


def leases(folder: Path) -> list[Row]:
    """Seconds to lease, make and commit next to nothing a thousand times."""
    os.environ.pop("RAY_ADDRESS", None)
    connect()
    import ray
    from ray.util import ActorPool

    def ours(number: int) -> float:
        config = _LeaseConfig(RunConfig(dir=str(folder / f"leases-{number}")))
        with Run.open("benchmark", config) as run:
            dataset = Dataset.create(str(folder / f"tiny-{number}"), TINY)
            pool = PoolConfig(actors=MAKERS, cpus_per_actor=1, gpus_per_actor=0)
            return float(TINY.num_shards / produce(run, dataset, f"{__name__}:Maker", pool, {})["images_per_second"])

    def peer(number: int) -> float:
        dataset = Dataset.create(str(folder / f"peer-{number}"), TINY)
        actor = ray.remote(PlainMaker)  # type: ignore[call-overload]
        began = time.perf_counter()
        pool = ActorPool([actor.options(num_cpus=1).remote(dataset.uri) for _ in range(MAKERS)])
        list(pool.map_unordered(lambda a, shard: a.run.remote(shard), list(range(SHARDS))))
        return time.perf_counter() - began

    seconds: dict[Callable[[int], float], list[float]] = {ours: [], peer: []}
    for number in range(ROUNDS):
        for one in (ours, peer) if number % 2 else (peer, ours):
            seconds[one].append(one(number))
    ray.shutdown()
    values = [statistics.median(found) for found in seconds.values()]
    what = f"{SHARDS:,} leases of next to no work, {MAKERS} makers"
    return [row(what, "s", values[0], "Ray's ActorPool, no leases, no restarts", values[1], "lower")]
