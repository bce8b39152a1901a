"""One place for metrics: the file is the source of truth, W&B has the same, and W&B's failure stops nothing."""

import json
import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayproj.storage.store import Store
from rayproj.tracking.tracker import Tracker, TrackingConfig, WandbMode, grid


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def track(store: Store, config: TrackingConfig, steps: range, resumed: int = 0) -> None:
    tracker = Tracker("demo-train", "train", store, config, {"train": {"lr": 0.1}})
    tracker.start()
    tracker.event({"type": "total", "steps": 10})
    tracker.event({"type": "resumed", "step": resumed, "ranks": 1})
    for step in steps:
        tracker.event({"type": "metrics", "step": step, "loss": 1.0 / step})
    tracker.event({"type": "span", "actor": "rank 0", "what": "steps", "start": 1.0, "end": 2.0})
    tracker.event({"type": "images", "name": "preview", "step": 4, "images": np.full((3, 1, 2, 2), 7, np.uint8)})
    tracker.finished({"seconds": 3.0, "steps": 10})
    tracker.close()


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a W&B offline file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield b"".join(parts)
            parts = []


def wandb_rows(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Run id and logged rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    run_id, rows = "", []
    for data in wandb_records(next(folder.glob("wandb/offline-run-*/*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return run_id, rows


def test_wandb_has_what_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    track(Store(str(tmp_path)), TrackingConfig(), range(1, 6))
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(s, 1.0 / s) for s in range(1, 6)]
    run_id, logged, deadline = "", [], time.monotonic() + 20  # W&B's service writes the file in its own time
    while not any("preview" in key for row in logged for key in row) and time.monotonic() < deadline:
        run_id, logged = wandb_rows(tmp_path)
    assert run_id == "demo-train"
    assert [(row["trainer/step"], row["loss"]) for row in logged if "loss" in row] == [
        (s, 1.0 / s) for s in range(1, 6)
    ]
    assert any("preview" in key for row in logged for key in row)


def test_a_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    config = TrackingConfig(wandb=WandbMode.disabled)
    track(Store(str(tmp_path)), config, range(1, 8))
    track(Store(str(tmp_path)), config, range(5, 11), resumed=4)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert len(lines(tmp_path / "timeline.jsonl")) == 2


def test_wandb_that_cannot_be_reached_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Online without a key: W&B refuses to start; the run goes on and the file is whole."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    track(Store(str(tmp_path)), TrackingConfig(), range(1, 4))
    assert capfd.readouterr().err.count("W&B is off for this run") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_a_store_that_cannot_append_gets_whole_files() -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    track(store, TrackingConfig(wandb=WandbMode.disabled), range(1, 4))
    track(store, TrackingConfig(wandb=WandbMode.disabled), range(4, 6), resumed=3)
    rows = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert store.exists("images/preview-00000004.png")


def test_images_are_kept_as_a_sheet(tmp_path: Path) -> None:
    track(Store(str(tmp_path)), TrackingConfig(wandb=WandbMode.disabled), range(1, 2))
    sheet = np.array(Image.open(tmp_path / "images" / "preview-00000004.png"))
    assert sheet.shape == (2, 6) and (sheet == 7).all()


def test_a_sheet_holds_every_image_in_its_place() -> None:
    images = np.arange(12 * 3 * 2 * 2, dtype=np.uint8).reshape(12, 3, 2, 2)
    sheet = grid(images, columns=5)
    assert sheet.shape == (6, 10, 3)
    for i in range(12):
        row, column = divmod(i, 5)
        cell = sheet[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert np.array_equal(cell.transpose(2, 0, 1), images[i])
    assert not sheet[4:, 4:].any()
