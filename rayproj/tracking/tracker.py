"""One place, in the driver, where a run's events go: metrics.jsonl (the source of truth), W&B, progress, the timeline."""

from __future__ import annotations

import io
import json
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rayproj.storage.store import Store
from rayproj.tracking.progress import StageProgress, say
from rayproj.tracking.wandb_sink import WandbSink


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
    """Takes a run's events; see `Tracker.event` for their kinds."""

    def __init__(self, run_id: str, store: Store, config: TrackingConfig, settings: dict[str, Any]) -> None:
        self.run_id, self.store, self.config, self.settings = run_id, store, config, settings
        # An object store cannot append: there, files grow in a scratch folder and are uploaded at commits and the end.
        self._scratch = None if store.local_path() else tempfile.TemporaryDirectory(prefix="rayproj-track-")
        self._folder = store.local_path() or Path(self._scratch.name)  # type: ignore[union-attr]
        self._progress = StageProgress(run_id.rpartition("-")[2] or run_id)
        self._wandb: WandbSink | None = None

    def start(self) -> None:
        """Begin taking events."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._scratch:
            for name in ("metrics.jsonl", "timeline.jsonl"):
                if self.store.exists(name):
                    (self._folder / name).write_bytes(self.store.read(name))
        self._wandb = WandbSink(self.run_id, self._folder, self.config, self.settings)

    def event(self, event: dict[str, Any]) -> None:
        """Take one event, by its "type":

        metrics (step, values...), span (actor, what, start, end: unix seconds), total (steps), resumed (step: rows of
        later steps are dropped, they will come again), commit (step), images (name, step, images: uint8 [N, C, H, W]),
        warning and restart (text).
        """
        kind = event["type"]
        values = {name: value for name, value in event.items() if name != "type"}
        if kind == "metrics":
            self._append("metrics.jsonl", {"time": time.time(), **values})
            self._progress.update(values["step"], values)
            if self._wandb:
                self._wandb.log({"trainer/step": values["step"], **{k: v for k, v in values.items() if k != "step"}})
        elif kind == "span":
            self._append("timeline.jsonl", values)
        elif kind == "total":
            self._progress.start(values["steps"])
        elif kind == "resumed":
            self._drop_after(values["step"])
            if values["step"]:
                say(f"{self.run_id}: going on from step {values['step']}.")
        elif kind == "images":
            self._images(**values)
        elif kind == "commit":
            self._upload()
        elif kind in ("warning", "restart"):
            self._append("events.jsonl", {"time": time.time(), "type": kind, **values})
            say(f"{self.run_id}: {values['text']}")

    def rows(self) -> list[dict[str, Any]]:
        """The logged metrics, oldest first."""
        path = self._folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finished(self, result: dict[str, Any]) -> None:
        """The run is done: its scalars become W&B's summary."""
        say(f"{self.run_id}: done in {result['seconds']:.0f} s.")
        if self._wandb:
            self._wandb.summary({k: v for k, v in result.items() if isinstance(v, (int, float, str))})

    def close(self) -> None:
        self._upload()
        if self._wandb:
            self._wandb.close()
            self._wandb = None
        if self._scratch:
            self._scratch.cleanup()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _drop_after(self, step: int) -> None:
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
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
            self._wandb.log_image(name, step, picture)

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
