"""Weights & Biases from a thread of its own: training never waits for it, and its failure is one warning."""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from typing import Any

from rayproj.tracking.progress import say

CLOSE_SECONDS = 30.0


class WandbSink:
    """One W&B run. The step is our own metric "trainer/step", because W&B's own cannot go back after a resume.

    The mode is the environment's WANDB_MODE or the config's; the id is the run's, so a resumed run goes on in it.
    """

    def __init__(self, run_id: str, folder: Path, config: Any, settings: dict[str, Any]) -> None:
        self.mode = os.environ.get("WANDB_MODE") or config.wandb.value
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
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

    def _work(self, run_id: str, folder: Path, config: Any, settings: dict[str, Any]) -> None:
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
            say(f"{run_id}: W&B is off for this run ({type(error).__name__}: {error}); metrics.jsonl has everything.")


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
