"""Weights & Biases from a thread of its own: training never waits for it, and its failure is one warning."""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rayproj.tracking.progress import say

CLOSE_SECONDS = 30.0

_open: set[WandbSink] = set()  # of this process, which share W&B's service
_opening = threading.Lock()


class WandbSink:
    """One W&B run. The step is our own metric "trainer/step", because W&B's own cannot go back after a resume.

    The mode is the environment's WANDB_MODE or the config's; the id is the run's, so a resumed run goes on in it.
    """

    def __init__(self, run_id: str, folder: Path, config: Any, settings: dict[str, Any]) -> None:
        self.mode = os.environ.get("WANDB_MODE") or config.wandb.value
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._run_id, self._given_up = run_id, False
        self._thread = threading.Thread(target=self._work, args=(run_id, folder, config, settings), daemon=True)
        if self.mode != "disabled":
            self._thread.start()

    def put(self, kind: str, value: Any) -> None:
        """Take what `_write` knows, and return at once."""
        self._queue.put((kind, value))

    def close(self) -> None:
        """Let what was logged be written, within reason."""
        if self._thread.is_alive():
            self._queue.put(("close", None))
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._given_up = True
                say(f"{self._run_id}: W&B does not take the rest of this run; metrics.jsonl has everything.")
                atexit.register(_kill_service)

    def _work(self, run_id: str, folder: Path, config: Any, settings: dict[str, Any]) -> None:
        with _opening:
            _open.add(self)
        try:
            import wandb

            run = wandb.init(
                project=config.project,
                group=config.group or None,
                id=run_id.replace("/", "-"),
                name=run_id,
                dir=str(folder),
                mode=self.mode,  # type: ignore[arg-type]
                resume="allow" if self.mode == "online" else None,
                reinit="create_new",
                config=settings,
                settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=True),
            )
            run.define_metric("*", step_metric="trainer/step")
            while True:
                kind, value = self._queue.get()
                if kind == "close":
                    run.finish()
                    return
                _write(run, kind, value)
        except Exception as error:
            if not self._given_up:
                what = f"{type(error).__name__}: {error}"
                say(f"{run_id}: W&B is off for this run ({what}); metrics.jsonl has everything.")
        finally:
            self._leave()

    def _leave(self) -> None:
        """End the service, if nobody else needs it: only then an offline file is complete."""
        with _opening:
            _open.discard(self)
            if not _open and self.mode == "offline" and (wandb := sys.modules.get("wandb")):
                wandb.teardown()


def _kill_service() -> None:
    """At the process's exit, which W&B's own hook would have wait for its service; that hook comes after this one."""
    import wandb

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    with suppress(Exception, SystemExit):  # the service has gone, and so its exit is no good one
        wandb.teardown()


def _write(run: Any, kind: str, value: Any) -> None:
    import wandb

    if kind == "log":
        run.log(value)
    elif kind == "image":
        name, step, picture = value
        run.log({"trainer/step": step, name: wandb.Image(picture)})
    elif kind == "table":
        run.log({value["name"]: wandb.Table(columns=value["columns"], data=value["rows"])})
    elif kind == "file":
        artifact = wandb.Artifact(f"{run.id}-{value['name']}", type=value["name"])
        artifact.add_file(value["path"])
        run.log_artifact(artifact)
    elif kind == "summary":
        run.summary.update(value)
    else:
        raise ValueError(kind)
