"""Checkpoints: every rank writes its own files, and whichever rank finishes last commits, once.

    checkpoints/step-00001200/a-<attempt>/...          the ranks' files
    checkpoints/step-00001200/a-<attempt>/files-*.json what each rank wrote, with sizes and hashes
    checkpoints/step-00001200/COMMIT.json              all of them: exclusive create; the checkpoint exists when this does

No rank waits for another. A rank that has put its list looks whether the lists are complete; the last to look finds
them so. Two may find it at once: exclusive create lets one win. A zombie of an earlier attempt writes under another
name and can at most complete its own attempt.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rayproj import faults
from rayproj.engine.engine import Engine, merge_ema
from rayproj.errors import UserError
from rayproj.storage.store import FileRecord, IntegrityError, Store, from_json, to_json


@dataclass
class CheckpointConfig:
    """When to checkpoint, and what to keep."""

    every_steps: int = 0  # 0: only by time and at the end
    every_seconds: float = 300.0  # 0: only by steps and at the end
    keep_last: int = 2  # older commits are deleted after a newer one exists
    keep_every: int = 0  # steps divisible by it are kept for ever; 0: none

    def problems(self) -> list[str]:
        return [] if self.keep_last >= 1 else [f"checkpoint.keep_last must be at least 1, not {self.keep_last}."]


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint."""

    step: int
    attempt: str
    world_size: int
    files: tuple[FileRecord, ...]  # paths relative to the attempt's folder
    committed_at: float

    @property
    def folder(self) -> str:
        return f"checkpoints/step-{self.step:08d}/a-{self.attempt}"


def due(config: CheckpointConfig, step: int, seconds_since_last: float) -> bool:
    """Whether to checkpoint after update number `step`."""
    by_steps = config.every_steps > 0 and step % config.every_steps == 0
    return by_steps or (config.every_seconds > 0 and seconds_since_last >= config.every_seconds)


def expired(config: CheckpointConfig, steps: Iterable[int]) -> list[int]:
    """Which of the committed steps may be deleted, oldest first."""
    ordered = sorted(steps)
    kept = set(ordered[-config.keep_last :])
    if config.keep_every:
        kept |= {s for s in ordered if s % config.keep_every == 0}
    return [s for s in ordered if s not in kept]


def commits(store: Store) -> list[Commit]:
    """Every committed checkpoint of a run, oldest first."""
    found = []
    for path in store.list("checkpoints"):
        if re.fullmatch(r"checkpoints/step-\d{8}/COMMIT\.json", path):
            record = from_json(store.read(path))
            files = tuple(FileRecord(**f) for f in record.pop("files"))
            found.append(Commit(files=files, **record))
    return sorted(found, key=lambda c: c.step)


def save(engine: Engine, store: Store, attempt: str, config: CheckpointConfig) -> bool:
    """Write this rank's files of a checkpoint at the engine's step. Collective.

    Returns:
        Whether this rank's files completed the checkpoint and it was this rank that committed it.
    """
    rank, world_size = engine.world.rank, engine.world.world_size
    folder = f"checkpoints/step-{engine.step:08d}/a-{attempt}"
    faults.maybe("checkpoint.before_write", rank)
    with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
        engine.write_state(Path(scratch))
        faults.maybe("checkpoint.before_upload", rank)
        files = sorted(p for p in Path(scratch).rglob("*") if p.is_file())
        records = [store.at(folder).upload(p, p.relative_to(scratch).as_posix()) for p in files]
    faults.maybe("checkpoint.before_list", rank)
    store.put_once(f"{folder}/files-{rank:05d}.json", to_json([asdict(r) for r in records]))
    faults.maybe("checkpoint.before_commit", rank)
    won = _commit_if_complete(store, folder, engine.step, attempt, world_size)
    faults.maybe("checkpoint.after_commit", rank)
    if won:
        done = commits(store)
        for step in expired(config, [c.step for c in done]):
            # The record goes first: what has no record is not a checkpoint, however much of it is left.
            store.delete_tree(f"checkpoints/step-{step:08d}/COMMIT.json")
            store.delete_tree(f"checkpoints/step-{step:08d}")
    return won


def _commit_if_complete(store: Store, folder: str, step: int, attempt: str, world_size: int) -> bool:
    lists = [f"{folder}/files-{rank:05d}.json" for rank in range(world_size)]
    if not all(store.exists(path) for path in lists):
        return False
    files = [entry for path in lists for entry in from_json(store.read(path))]
    record = {
        "step": step,
        "attempt": attempt,
        "world_size": world_size,
        "files": files,
        "committed_at": time.time(),
    }
    return store.put_once(f"checkpoints/step-{step:08d}/COMMIT.json", to_json(record))


def restore(engine: Engine, store: Store, warn: Callable[[str], Any]) -> int | None:
    """Load the newest commit whose every file is sound. Collective.

    Files are verified before any byte of them is unpickled. Rank 0 chooses for all: it names a damaged commit, sets its
    record aside as `DAMAGED.json` so that its step can be committed anew, and tries the one before it.

    Returns:
        The step resumed from, or None where there is no commit.

    Raises:
        UserError: there are commits but none is sound, or the newest sound one has another shape.
    """
    with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
        choice: list[Any] = [None]
        if engine.world.rank == 0:
            try:
                choice[0] = _newest_sound(store, Path(scratch), warn)
            except UserError as error:
                choice[0] = error
        dist.broadcast_object_list(choice, src=0)
        if isinstance(choice[0], UserError):
            raise choice[0]
        if choice[0] is None:
            return None
        commit: Commit = choice[0]
        if engine.world.rank != 0:
            _download(store, commit, commit.files, Path(scratch))
        engine.read_state(Path(scratch))
        return commit.step


def _newest_sound(store: Store, scratch: Path, warn: Callable[[str], Any]) -> Commit | None:
    done = commits(store)
    for commit in reversed(done):
        try:
            _download(store, commit, commit.files, scratch)
            return commit
        except (IntegrityError, FileNotFoundError) as error:
            warn(f"The checkpoint of step {commit.step} is damaged ({error}); trying the one before it.")
            place = f"checkpoints/step-{commit.step:08d}"
            store.write(f"{place}/DAMAGED.json", store.read(f"{place}/COMMIT.json"))
            store.delete_tree(f"{place}/COMMIT.json")
    if done:
        raise UserError(f"All checkpoints below {store.uri}/checkpoints are damaged; start again in another run.dir.")
    return None


def load_ema(store: Store) -> tuple[dict[str, Tensor], Commit]:
    """The averaged weights of the newest commit of a run, for inference: flat fp32 tensors by name.

    Raises:
        UserError: the run has no commit.
    """
    done = commits(store)
    if not done:
        raise UserError(f"The run {store.uri} has no committed checkpoint; train it first.")
    files = [f for f in done[-1].files if f.path.startswith("ema/")]
    with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
        _download(store, done[-1], files, Path(scratch))
        return merge_ema([Path(scratch) / f.path for f in files]), done[-1]


def _download(store: Store, commit: Commit, files: Iterable[FileRecord], into: Path) -> None:
    for record in files:
        target = into / record.path
        target.parent.mkdir(parents=True, exist_ok=True)
        store.at(commit.folder).download(record, target)
