"""A run: its folder, its config, its tracker, its result. All of it lies in the store, so any driver can go on with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from rayproj import config as configuration
from rayproj.errors import UserError
from rayproj.storage.store import Store, from_json, to_json
from rayproj.tracking.tracker import Tracker

# What may differ between two starts of one run: where and how it runs, not what it computes.
FREE = ("cluster", "pool", "tracking", "wait_seconds", "train.checkpoint", "train.log_every", "train.preview_every")


@dataclass
class RunConfig:
    """Where a run keeps everything, and its seed."""

    dir: str = "???"  # a folder, or any URI that fsspec knows; one that exists is resumed
    seed: int = 0


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
        self.result: dict[str, Any] | None = (
            from_json(store.read("result.json")) if store.exists("result.json") else None
        )
        self.tracker = Tracker(self.id, store, config.tracking, self.config)
        self._began = time.time()

    @classmethod
    @contextmanager
    def open(cls, job: str, config: Any) -> Iterator[Run]:
        """Open a run for a block, new or to be resumed.

        Raises:
            UserError: the folder belongs to another config.
        """
        store = Store(config.run.dir)
        text = configuration.to_yaml(config).encode()
        if not store.put_once("config.yaml", text):
            _require_same(store, text)
        run = cls(job, store, config)
        if run.result is None:
            run.tracker.start()
        try:
            yield run
        finally:
            if run.result is None:  # stopped or failed: its time counts all the same
                store.put_once(f"attempts/{run._began:.3f}.json", to_json({"seconds": time.time() - run._began}))
            run.tracker.close()

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record what the job found, once; from then on the run is done."""
        spent = sum(from_json(self.store.read(path))["seconds"] for path in self.store.list("attempts"))
        self.result = {
            **result,
            "job": self.job,
            "seconds": spent + time.time() - self._began,
            "finished_at": time.time(),
        }
        self.store.put_once("result.json", to_json(self.result))
        self.tracker.finished(self.result)
        return self.result


def _require_same(store: Store, text: bytes) -> None:
    before, now = (
        _flat(OmegaConf.to_container(OmegaConf.create(t.decode()))) for t in (store.read("config.yaml"), text)
    )
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


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, child in value.items() for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()
    }
