"""A run: its folder, its config, its tracker, its result. All of it lies in the store, so any driver can go on with it.

run.json                      which job it is of
config.yaml                   its resolved config
attempts/<began>/start.json   a driver took it up
attempts/<began>/end.json     and left it: done, stopped or failed, and why; none if the driver was killed
stop.json                     `rayproj stop` asks the driver to commit and leave
result.json                   what the job found; from then on the run is done
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from rayproj import __version__
from rayproj import config as configuration
from rayproj.errors import Interrupted, UserError
from rayproj.storage.store import Store, from_json, to_json
from rayproj.tracking.tracker import Tracker

# What may differ between two starts of one run: where and how it runs, not what it computes, but for rounding.
FREE = (
    *("run.dir", "cluster", "pool", "room", "tracking", "wait_seconds", "train.micro_batch", "train.engine.zero_stage"),
    *("train.checkpoint", "train.log_every", "train.preview_every", "train.peak_tflops", "serve"),
)
LOOK_SECONDS = 2.0  # between looks for the wish of a person to stop


@dataclass
class RunConfig:
    """Where a run keeps everything, and its seed."""

    dir: str = "???"  # a folder, or any URI that fsspec knows; one that exists is resumed
    seed: int = 0


@dataclass(frozen=True)
class Attempt:
    """The time in which one driver worked on a run; times are unix seconds."""

    began: float
    host: str
    pid: int  # of the driver
    ended: float | None  # None: it runs, or its driver was killed
    outcome: str | None  # done, stopped or failed
    why: str  # of a failure


def attempts(store: Store) -> list[Attempt]:
    """The attempts at a run, oldest first."""
    found = []
    for path in store.list("attempts"):
        if path.endswith("/start.json"):
            began, host, pid = store.parsed(path, lambda data: itemgetter("began", "host", "pid")(from_json(data)))
            end_path = path.replace("start.json", "end.json")
            end: dict[str, Any] = store.parsed(end_path) if store.exists(end_path) else {}
            found.append(Attempt(began, host, pid, end.get("ended"), end.get("outcome"), end.get("why", "")))
    return sorted(found, key=lambda attempt: attempt.began)


def seconds(done: list[Attempt], signs: list[float]) -> float:
    """How long drivers worked on a run; one that was killed, until its last sign of life (unix seconds)."""
    total = 0.0
    for number, attempt in enumerate(done):
        after = done[number + 1].began if number + 1 < len(done) else float("inf")
        last = max((t for t in signs if attempt.began <= t < after), default=attempt.began)
        total += (attempt.ended or last) - attempt.began
    return total


class Run:
    """One job's run, open in the driver.

    Attributes:
        job: the job's name.
        id: stable name, from the last two parts of the folder.
        config: the resolved config.
        result: what the finished job said, or None.
        tracker: takes the run's events.
    """

    def __init__(self, job: str, store: Store, config: Any) -> None:
        self.job, self.store = job, store
        self.id = "-".join(store.uri.replace("://", "/").rstrip("/").split("/")[-2:])
        self.config: dict[str, Any] = configuration.to_dict(config)
        self.result: dict[str, Any] | None = store.parsed("result.json") if store.exists("result.json") else None
        self.tracker = Tracker(self.id, job, store, config.tracking, self.config)
        self._began = self._looked = time.time()

    @classmethod
    @contextmanager
    def open(cls, job: str, config: Any) -> Iterator[Run]:
        """Open a run for a block, new or to be resumed.

        Raises:
            UserError: the folder belongs to another job or config.
        """
        store = Store(config.run.dir)
        if not store.put_once("run.json", to_json(_begun(job))):
            _require_job(store, job)
        if not store.put_once("config.yaml", configuration.to_yaml(config).encode()):
            require_same(store, config)
        run = cls(job, store, config)
        try:
            with run._attempt():
                yield run
        finally:
            run.tracker.close()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Record when a driver worked on the run, and how that ended."""
        if self.result is not None:
            yield
            return
        self.store.delete_tree("stop.json")  # that was meant for the attempt before
        before = attempts(self.store)
        _require_nobody(self.store, before)
        place = f"attempts/{self._began:.3f}"
        start = {"began": self._began, "host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        self.store.put_once(f"{place}/start.json", to_json(start))
        self.tracker.start()
        self.tracker.worked_before = self._spent_before = seconds(before, self.tracker.signs())
        if before and before[-1].ended is None:
            text = "The driver of the last attempt was lost; going on from the last commit."
            self.tracker.event({"type": "restart", "cause": "driver lost", "text": text})
        outcome, why = "failed", ""
        try:
            yield
            outcome = "done" if self.result is not None else "stopped"
        except Interrupted:
            outcome = "stopped"
            raise
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            end = {"ended": time.time(), "outcome": outcome, "why": why}
            self.store.put_once(f"{place}/end.json", to_json(end))

    def stop_wished(self) -> bool:
        """Whether `rayproj stop` asked this run to end; looks now and then."""
        if time.time() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.time()
        return self.store.exists("stop.json")

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record what the job found, once; from then on the run is done."""
        now = time.time()
        self.result = {
            **result,
            **self.tracker.totals(),
            "job": self.job,
            "seconds": self._spent_before + now - self._began,
            "finished_at": now,
        }
        self.store.put_once("result.json", to_json(self.result))
        self.tracker.finished(self.result)
        return self.result


def _begun(job: str) -> dict[str, Any]:
    """What a new run records of itself; the revision is that of the checkout, "" for a wheel."""
    root = Path(__file__).resolve().parents[2]
    revision = ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError):
            revision = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"job": job, "version": __version__, "revision": revision, "created_at": time.time()}


def job_of(run_dir: str) -> str:
    """The job that a run is of.

    Raises:
        UserError: there is no run, or its record is damaged.
    """
    store = Store(run_dir)
    if not store.exists("run.json"):
        raise UserError(f"There is no run at '{run_dir}'; 'rayproj status FOLDER' lists those below a folder.")
    return _job(store)


def _job(store: Store) -> str:
    return store.parsed("run.json", lambda data: str(from_json(data)["job"]))


def wish_stop(run_dir: str) -> str:
    """Ask the driver of a run, wherever it is, to commit and leave; returns what is to be expected.

    Raises:
        UserError: there is no run, or nobody works on it.
    """
    job_of(run_dir)
    store = Store(run_dir)
    if store.exists("result.json"):
        raise UserError(f"The run '{run_dir}' is done; there is nothing to stop.")
    last = attempts(store)[-1:]
    if last and last[0].outcome:
        raise UserError(f"Nobody works on the run '{run_dir}': it {last[0].outcome} already.")
    store.write("stop.json", to_json({"at": time.time()}))
    return f"Asked {store.uri} to commit and stop; 'rayproj resume {store.uri}' goes on with it."


def _require_nobody(store: Store, before: list[Attempt]) -> None:
    """As far as can be seen from this machine: two drivers would train the same run beside each other."""
    for attempt in before:
        if attempt.ended is None and attempt.host == socket.gethostname() and psutil.pid_exists(attempt.pid):
            process = psutil.Process(attempt.pid)
            if process.create_time() <= attempt.began and process.status() != psutil.STATUS_ZOMBIE:
                raise UserError(
                    f"The process {attempt.pid} works on the run '{store.uri}' already; "
                    f"wait for it, or end it by 'rayproj stop {store.uri}'."
                )


def _require_job(store: Store, job: str) -> None:
    before = _job(store)
    if before != job:
        raise UserError(
            f"The run dir '{store.uri}' belongs to the job {before}, not {job}; set another run.dir, "
            "or delete that folder to start again."
        )


def require_same(store: Store, config: Any) -> None:
    """Make sure that a run dir is of this config, but for where and how it runs.

    Raises:
        UserError: it is not, with the differences.
    """
    texts = configuration.to_yaml(type(config)()), store.read("config.yaml").decode(), configuration.to_yaml(config)
    default, stored, now = (_flat(OmegaConf.to_container(OmegaConf.create(text))) for text in texts)
    before = default | stored  # what a version before did not have is as it is by default
    before |= {
        key: value for key, value in _filled(type(config), texts[1]).items() if isinstance(before.get(key), list)
    }
    differing = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == f or key.startswith(f"{f}.") for f in FREE)
    ]
    if differing:
        raise UserError(
            f"The run dir '{store.uri}' belongs to another config ({'; '.join(differing)}); "
            "set another run.dir, or delete that folder to start again."
        )


def _filled(schema: type, text: str) -> dict[str, Any]:
    """A config that a run saved with the defaults of what it lacks, also in the items of its lists; {} if it has what there
    is no more."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(text))
        filled = configuration.to_yaml(configuration.from_dict(schema, values))
        return _flat(OmegaConf.to_container(OmegaConf.create(filled)))
    except UserError:
        return {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, child in value.items() for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()
    }
