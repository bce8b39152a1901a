"""One place for metrics: the file is the source of truth, W&B has the same, and W&B's failure stops nothing."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayproj.errors import UserError
from rayproj.storage.store import Store
from rayproj.tracking.tracker import Tracker, TrackingConfig, WandbMode, grid, rows_of

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"train": {"lr": 0.1, "steps": 10}, "name": "ε"}


@pytest.fixture(autouse=True)
def wandb_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of W&B in the home of whoever runs the tests."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp("wandb")))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def track(store: Store, config: TrackingConfig, steps: range, resumed: int = 0) -> None:
    tracker = Tracker("demo-train", "train", store, config, SETTINGS)
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


@dataclass
class Logged:
    """What an offline file of W&B holds."""

    folder: Path
    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)  # by name: type, sizes by file
    finished: bool = False


def items(found: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found}


def read_wandb(path: Path) -> Logged:
    from wandb.proto import wandb_internal_pb2

    logged = Logged(path.parent)
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            logged.run_id, logged.config = record.run.run_id, items(record.run.config.update)
        elif kind == "history":
            logged.rows.append(items(record.history.item))
        elif kind == "summary":
            logged.summary |= items(record.summary.update)
        elif kind == "artifact":
            sizes = {entry.path: entry.size for entry in record.artifact.manifest.contents}
            logged.artifacts[record.artifact.name] = (record.artifact.type, sizes)
        logged.finished |= kind == "exit"
    return logged


def wandb_runs(folder: Path, count: int = 1) -> list[Logged]:
    """The offline files below a run, oldest first, when all of them are complete."""
    deadline = time.monotonic() + 20  # W&B's service writes them in its own time
    while True:
        found = [read_wandb(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        if len(found) == count and all(logged.finished for logged in found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_wandb_has_what_the_file_has(tmp_path: Path) -> None:
    track(Store(str(tmp_path)), TrackingConfig(), range(1, 6))
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(s, 1.0 / s) for s in range(1, 6)]
    (logged,) = wandb_runs(tmp_path)
    assert logged.run_id == "demo-train"
    assert {key: value for key, value in logged.config.items() if key != "_wandb"} == SETTINGS
    own = [{k: v for k, v in row.items() if k[0] != "_"} for row in logged.rows if "loss" in row]
    assert own == [{"trainer/step": r.pop("step"), **{k: v for k, v in r.items() if k != "time"}} for r in rows]
    assert {"seconds": 3.0, "steps": 10}.items() <= logged.summary.items()


def test_wandb_has_the_samples_as_a_picture_and_files_as_artifacts(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(b"x" * 123)
    tracker = Tracker("demo-train", "train", Store(str(tmp_path)), TrackingConfig(), SETTINGS)
    tracker.start()
    images = np.arange(3 * 3 * 2 * 2, dtype=np.uint8).reshape(3, 3, 2, 2)
    tracker.event({"type": "images", "name": "preview", "step": 4, "images": images})
    tracker.event({"type": "file", "name": "report", "path": str(tmp_path / "report.html")})
    tracker.event({"type": "table", "name": "scores", "columns": ["class", "score"], "rows": [["a", 1], ["b", 2]]})
    tracker.close()
    (logged,) = wandb_runs(tmp_path)
    (row,) = [row for row in logged.rows if "preview/path" in row]
    assert row["trainer/step"] == 4 and row["preview/_type"] == "image-file"
    assert np.array_equal(np.array(Image.open(logged.folder / "files" / row["preview/path"])), grid(images))
    assert logged.artifacts["demo-train-report"] == ("report", {"report.html": 123})
    (row,) = [row for row in logged.rows if "scores/path" in row]
    table = json.loads((logged.folder / "files" / row["scores/path"]).read_text())
    assert table["columns"] == ["class", "score"] and table["data"] == [["a", 1], ["b", 2]]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    track(Store(str(tmp_path)), TrackingConfig(), range(1, 8))
    time.sleep(1.1)  # W&B names folders by the second
    track(Store(str(tmp_path)), TrackingConfig(), range(5, 11), resumed=4)
    runs = wandb_runs(tmp_path, 2)
    assert [logged.run_id for logged in runs] == ["demo-train"] * 2
    steps = [[row["trainer/step"] for row in logged.rows if "loss" in row] for logged in runs]
    assert steps == [list(range(1, 8)), list(range(5, 11))]
    assert set(steps[0]) | set(steps[1]) == {row["step"] for row in lines(tmp_path / "metrics.jsonl")}


def test_of_two_runs_in_one_process_one_may_end_before_the_other(tmp_path: Path) -> None:
    trackers = [Tracker(n, "train", Store(str(tmp_path / n)), TrackingConfig(), SETTINGS) for n in ("a", "b")]
    for tracker in trackers:
        tracker.start()
    for step, tracker in enumerate(trackers, 1):
        tracker.event({"type": "metrics", "step": step, "loss": 1.0})
        tracker.close()
    for step, name in enumerate("ab", 1):
        (logged,) = wandb_runs(tmp_path / name)
        assert [row["trainer/step"] for row in logged.rows] == [step]


def test_a_run_in_an_object_store_keeps_its_wandb_files_there(tmp_path: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    track(store, TrackingConfig(), range(1, 4))
    for path in store.list("wandb"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(store.read(path))
    (logged,) = wandb_runs(tmp_path)
    assert [row["loss"] for row in logged.rows if "loss" in row] == [1.0, 1 / 2, 1 / 3]
    assert list(logged.folder.glob("files/media/images/preview*.png"))


def test_a_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    config = TrackingConfig(wandb=WandbMode.disabled)
    track(Store(str(tmp_path)), config, range(1, 8))
    track(Store(str(tmp_path)), config, range(5, 11), resumed=4)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert len(lines(tmp_path / "timeline.jsonl")) == 2


def test_half_a_line_as_a_full_disk_leaves_it_is_in_nobodys_way(tmp_path: Path) -> None:
    config = TrackingConfig(wandb=WandbMode.disabled)
    store = Store(str(tmp_path))
    track(store, config, range(1, 4))
    for name in ("metrics.jsonl", "timeline.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"time": 17')
    assert [row["step"] for row in rows_of(store, "metrics.jsonl")] == [1, 2, 3], "whoever reads passes over it"
    track(store, config, range(4, 6), resumed=3)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert len(lines(tmp_path / "timeline.jsonl")) == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl' is damaged and cannot be read"):
        rows_of(store, "metrics.jsonl")


@pytest.mark.parametrize("what", ["refuses to start", "is not there"])
def test_wandb_that_cannot_be_had_is_one_warning(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, the file is whole, and nothing else is said."""
    if what == "is not there":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setenv("WANDB_MODE", "nonsense")
    track(Store(str(tmp_path)), TrackingConfig(), range(1, 4))
    said = capfd.readouterr().err
    assert said.count("W&B is off for this run") == 1 and "Traceback" not in said
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


UNREACHABLE = """
import json, sys, time
from rayproj.storage.store import Store
from rayproj.tracking import wandb_sink
from rayproj.tracking.tracker import Tracker, TrackingConfig
wandb_sink.CLOSE_SECONDS = 2.0
tracker, marks = Tracker("demo-train", "train", Store(sys.argv[1]), TrackingConfig(), {}), [time.monotonic()]
tracker.start()
for step in range(1, 101):
    tracker.event({"type": "metrics", "step": step, "loss": 1.0 / step})
marks.append(time.monotonic())
time.sleep(1)  # training
tracker.close()
marks.append(time.monotonic())
print(json.dumps([marks[1] - marks[0], marks[2] - marks[1] - 1]), flush=True)
"""


def test_training_never_waits_for_wandb_not_even_at_its_end(tmp_path: Path) -> None:
    """A server that takes every connection and never answers."""
    taken: list[Any] = []

    def take(server: socket.socket) -> None:
        while True:
            try:
                taken.append(server.accept())
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=take, args=(server,), daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        online = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | online  # a process of W&B of its own
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [sys.executable, "-c", UNREACHABLE, str(tmp_path)], cwd=ROOT, env=env, text=True, **pipes
        )
        events, close = json.loads(process.stdout.readline())
        closed = time.monotonic()
        _, stderr = process.communicate(timeout=100)
        left = time.monotonic() - closed
    assert taken, "W&B did try"
    assert events < 0.5 and close < 4 and left < 10
    assert process.returncode == 0 and "Traceback" not in stderr
    assert stderr.count("demo-train: W&B does not take the rest of this run; metrics.jsonl has everything") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 100


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
