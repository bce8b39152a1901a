"""One place, in the driver, where a run's events go: metrics.jsonl (the source of truth), W&B, Prometheus, progress, the
timeline."""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rayproj.storage.store import Store
from rayproj.tracking.goodput import Goodput
from rayproj.tracking.progress import StageProgress, say
from rayproj.tracking.prometheus import PrometheusSink
from rayproj.tracking.wandb_sink import WandbSink

FILES = ("metrics.jsonl", "timeline.jsonl", "events.jsonl")


def rows_of(store: Store, name: str) -> list[dict[str, Any]]:
    """The rows of one of a run's files; what follows the last whole line, as a full disk leaves it, is none.

    Raises:
        UserError: the file is damaged.
    """
    if not store.exists(name):
        return []
    return store.parsed(name, lambda data: [json.loads(line) for line in _whole(data).splitlines()])


def _whole(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    project: str = "rayproj"
    group: str = ""
    wandb: WandbMode = WandbMode.offline  # the environment's WANDB_MODE wins


class Tracker:
    """Takes a run's events; see `Tracker.event` for their kinds.

    Attributes:
        worked_before: seconds that earlier attempts worked on the run.
        restarts: how often it was begun anew, by cause.
    """

    def __init__(self, run_id: str, job: str, store: Store, config: TrackingConfig, settings: dict[str, Any]) -> None:
        self.run_id, self.job, self.store, self.config, self.settings = run_id, job, store, config, settings
        # An object store cannot append: there, files grow in a scratch folder and are uploaded at commits and the end.
        self._scratch = None if store.local_path() else tempfile.TemporaryDirectory(prefix="rayproj-track-")
        self._folder = store.local_path() or Path(self._scratch.name)  # type: ignore[union-attr]
        self._progress = StageProgress(run_id.rpartition("-")[2] or run_id)
        self._wandb: WandbSink | None = None
        self._prometheus: PrometheusSink | None = None
        self._ranks: dict[str, int] = {}
        self.worked_before, self._began = 0.0, time.time()
        self.restarts: Counter[str] = Counter()
        self._goodput = Goodput()

    def start(self) -> None:
        """Begin taking events."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._scratch:
            for name in FILES:
                if self.store.exists(name):
                    (self._folder / name).write_bytes(self.store.read(name))
        for path in (self._folder / name for name in FILES):
            if path.exists():  # else the next line would be appended to half of one
                os.truncate(path, len(_whole(path.read_bytes())))
        self._wandb = WandbSink(self.run_id, self._folder, self.config, self.settings)
        self._prometheus = PrometheusSink(self.run_id, self.job)
        self.restarts = Counter(e["cause"] for e in self._lines("events.jsonl") if e["type"] == "restart")

    def event(self, event: dict[str, Any]) -> None:
        """Take one event, by its "type":

        metrics (step, values...), span (actor, what, start, end: unix seconds), total (steps), resumed (step, ranks: rows
        of later steps are dropped, they will come again), commit (step), images (name, step, images: uint8
        [N, C, H, W]), table (name, columns, rows), file (name, path: of an artifact), warning (text) and restart (text,
        cause).
        """
        kind = event["type"]
        values = {name: value for name, value in event.items() if name != "type"}
        if kind == "metrics":
            self._metrics(values)
        elif kind == "span":
            self._append("timeline.jsonl", values)
        elif kind == "total":
            self._progress.start(values["steps"])
        elif kind == "resumed":
            self._drop_after(values["step"])
            self._ranks = {"ranks": values["ranks"]}
            if values["step"]:
                say(f"{self.run_id}: going on from step {values['step']}.")
        elif kind == "images":
            self._images(**values)
        elif kind == "commit":
            self._upload()
        elif kind in ("table", "file"):
            if self._wandb:
                self._wandb.put(kind, values)
        elif kind in ("warning", "restart"):
            self._append("events.jsonl", {"time": time.time(), "type": kind, **values})
            say(f"{self.run_id}: {values['text']}")
            if kind == "restart":
                self.restarts[values["cause"]] += 1
                if self._prometheus:
                    self._prometheus.restart(values["cause"])

    def _metrics(self, values: dict[str, Any]) -> None:
        self._goodput.add(values)
        row = {**values, **self._ranks, "restarts": self.restarts.total(), **self._share()}
        self._append("metrics.jsonl", {"time": time.time(), **row})
        self._progress.update(row["step"], row)
        if self._wandb:
            self._wandb.put("log", {"trainer/step": row["step"], **{k: v for k, v in row.items() if k != "step"}})
        if self._prometheus:
            self._prometheus.set(row)

    def rows(self) -> list[dict[str, Any]]:
        """The logged metrics, oldest first."""
        return self._lines("metrics.jsonl")

    def signs(self) -> list[float]:
        """When the run showed that it lived, in unix seconds."""
        spans = [span["end"] for span in self._lines("timeline.jsonl")]
        return spans + [row["time"] for name in ("metrics.jsonl", "events.jsonl") for row in self._lines(name)]

    def totals(self) -> dict[str, Any]:
        """What the whole run's goodput and restarts came to."""
        return {"restarts": dict(self.restarts), **self._share()}

    def _share(self) -> dict[str, float]:
        return self._goodput.share(self.worked_before + time.time() - self._began)

    def finished(self, result: dict[str, Any]) -> None:
        """The run is done: its scalars become W&B's summary and a table of it."""
        say(f"{self.run_id}: done in {result['seconds']:.0f} s.")
        if self._wandb:
            scalars = {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
            self._wandb.put("summary", scalars)
            rows = [[name, str(value)] for name, value in scalars.items()]
            self._wandb.put("table", {"name": "result", "columns": ["name", "value"], "rows": rows})

    def close(self) -> None:
        self._upload()
        if self._wandb:
            self._wandb.close()
            self._wandb = None
        if self._scratch:
            for path in self._folder.glob("wandb/offline-run-*/**/*"):  # for `wandb sync`
                if path.is_file():
                    self.store.write(path.relative_to(self._folder).as_posix(), path.read_bytes())
            self._scratch.cleanup()

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return rows_of(Store(str(self._folder)), name)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _drop_after(self, step: int) -> None:
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        self._goodput = Goodput(kept)
        if len(kept) < len(rows):
            text = "".join(json.dumps(row) + "\n" for row in kept)
            Store(str(self._folder)).write("metrics.jsonl", text.encode())

    def _images(self, name: str, step: int, images: Any) -> None:
        from PIL import Image

        picture = Image.fromarray(grid(images))
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        self.store.write(f"images/{name}-{step:08d}.png", buffer.getvalue())
        if self._wandb:
            self._wandb.put("image", (name, step, picture))

    def _upload(self) -> None:
        if self._scratch:
            for path in self._folder.glob("*.jsonl"):
                self.store.write(path.name, path.read_bytes())


def grid(images: Any, columns: int = 10) -> Any:
    """uint8 [N, C, H, W] as one picture [rows*H, columns*W] or [..., 3], at most 100 images."""
    import numpy as np

    images = images[:100]
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    return sheet[..., 0] if channels == 1 else sheet
