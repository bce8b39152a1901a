"""Checkpoints: every rank writes its own files, and whichever rank finishes last commits, once.

    checkpoints/step-00001200/a-<attempt>/master/part-00000.safetensors   rank 0's pieces of the master weights (`layout`)
    checkpoints/step-00001200/a-<attempt>/{exp_avg,exp_avg_sq,ema}/...    likewise, and ema-0.05 of further averages
    checkpoints/step-00001200/a-<attempt>/rank-00000.safetensors          rank 0's generator states
    checkpoints/step-00001200/a-<attempt>/{fixed.safetensors,state.json}  buffers and position, by rank 0
    checkpoints/step-00001200/a-<attempt>/files-00000.json                what rank 0 wrote, with sizes and hashes
    checkpoints/step-00001200/COMMIT.json                                 all of them: exclusive create; the checkpoint
                                                                          exists when this does
No rank waits for another. A rank that has put its list looks whether the lists are complete; the last to look finds
them so. Two may find it at once: exclusive create lets one win. A zombie of an earlier attempt writes under another
name and can at most complete its own attempt.

The pieces bear the names of parameters and not of ranks, so a checkpoint loads at any world size and ZeRO stage, and
nothing in it is a pickle.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayproj import faults
from rayproj.config import below
from rayproj.engine.ema import combination
from rayproj.engine.engine import Engine, Snapshot
from rayproj.engine.layout import join
from rayproj.errors import UserError
from rayproj.storage.store import FileRecord, IntegrityError, Store, from_json, to_json

TOLERATED = 0.1  # relative error of the profile of an average that is put together


class Best(Enum):
    lowest = "lowest"
    highest = "highest"


@dataclass
class CheckpointConfig:
    """When to checkpoint, and what to keep."""

    every_steps: int = 0  # 0: only by time and at the end
    every_seconds: float = 300.0  # 0: only by steps and at the end
    keep_last: int = 2  # older commits are deleted after a newer one exists
    keep_every: int = 0  # steps divisible by it are kept for ever; 0: none
    keep_best: int = 0  # as many of the best by `best_metric` are kept too
    best_metric: str = "loss"  # a logged metric; commits that lack it are never best
    best: Best = Best.lowest
    asynchronous: bool = True  # hash and upload beside the training, which then stops for a copy to the host alone

    def problems(self) -> list[str]:
        found = below(0, "checkpoint", self, "every_steps", "every_seconds", "keep_every", "keep_best")
        return below(1, "checkpoint", self, "keep_last") + found


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint."""

    step: int
    attempt: str
    world_size: int
    zero_stage: int
    files: tuple[FileRecord, ...]  # paths relative to the attempt's folder
    metrics: dict[str, float]  # as last logged before it
    committed_at: float

    @property
    def folder(self) -> str:
        return f"checkpoints/step-{self.step:08d}/a-{self.attempt}"


def due(config: CheckpointConfig, step: int, seconds_since_last: float) -> bool:
    """Whether to checkpoint after update number `step`."""
    by_steps = config.every_steps > 0 and step % config.every_steps == 0
    return by_steps or (config.every_seconds > 0 and seconds_since_last >= config.every_seconds)


def expired(config: CheckpointConfig, committed: Iterable[Commit]) -> list[int]:
    """Which of the committed steps may be deleted, oldest first."""
    ordered = sorted(committed, key=lambda c: c.step)
    kept = {c.step for c in ordered[-config.keep_last :]}
    if config.keep_every:
        kept |= {c.step for c in ordered if c.step % config.keep_every == 0}
    if config.keep_best:
        sign = 1 if config.best is Best.lowest else -1
        rated = [c for c in ordered if config.best_metric in c.metrics]
        # Of equals the newer: it was trained longer.
        rated.sort(key=lambda c: (sign * c.metrics[config.best_metric], -c.step))
        kept |= {c.step for c in rated[: config.keep_best]}
    return [c.step for c in ordered if c.step not in kept]


def commits(store: Store, name: str = "COMMIT.json") -> list[Commit]:
    """Every committed checkpoint of a run whose record can be read, oldest first."""
    return sorted(filter(None, records(store, name).values()), key=lambda c: c.step)


def records(store: Store, name: str = "COMMIT.json") -> dict[str, Commit | None]:
    """Every record of a run's checkpoints by its path; None for one that cannot be read."""
    found: dict[str, Commit | None] = {}
    for path in store.list("checkpoints"):
        if re.fullmatch(rf"checkpoints/step-\d{{8}}/{re.escape(name)}", path):
            try:
                record = from_json(store.read(path))
                found[path] = Commit(files=tuple(FileRecord(**f) for f in record.pop("files")), **record)
            except FileNotFoundError:  # deleted meanwhile, as what has expired is
                continue
            except (ValueError, TypeError, KeyError, AttributeError):
                found[path] = None
    return found


class Saver:
    """Writes one rank's checkpoints of one start, one at a time.

    Args:
        attempt: names this start.
        on_commit: called with the step when this rank was the one to commit; perhaps from another thread.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        attempt: str,
        config: CheckpointConfig,
        on_commit: Callable[[int], Any] = lambda step: None,
    ) -> None:
        self.engine, self.store, self.attempt, self.config, self.on_commit = engine, store, attempt, config, on_commit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, metrics: dict[str, float]) -> None:
        """Write this rank's part of a checkpoint at the engine's step; returns once the state is copied, if asynchronous.

        Collective. Waits for the one before; raises what that one failed with.
        """
        self.wait()
        faults.maybe("checkpoint.before_snapshot", self.engine.world.rank)
        snapshot = self.engine.snapshot()
        self._pending = self._thread.submit(self._write, snapshot, metrics)
        if not self.config.asynchronous:
            self.wait()

    def check(self) -> None:
        """Raise what a save failed with, if one did; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until this rank's files are up. The commit may be another rank's."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        rank, step = self.engine.world.rank, snapshot.position["step"]
        folder = f"checkpoints/step-{step:08d}/a-{self.attempt}"
        faults.maybe("checkpoint.before_write", rank)
        with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
            _to_files(snapshot, rank, Path(scratch))
            faults.maybe("checkpoint.before_upload", rank)
            files = sorted(p for p in Path(scratch).rglob("*") if p.is_file())
            records = []
            for file in files:
                records.append(self.store.at(folder).upload(file, file.relative_to(scratch).as_posix()))
                faults.maybe("checkpoint.after_file", rank)
        faults.maybe("checkpoint.before_list", rank)
        self.store.put_once(f"{folder}/files-{rank:05d}.json", to_json([asdict(r) for r in records]))
        faults.maybe("checkpoint.before_commit", rank)
        if _commit_if_complete(self.store, folder, snapshot.position, self.attempt, metrics):
            faults.maybe("checkpoint.after_commit", rank)
            self.on_commit(step)
            tidy(self.store, self.config, self.attempt, faults_of=rank)
        faults.maybe("checkpoint.after_all", rank)


def _to_files(snapshot: Snapshot, rank: int, folder: Path) -> None:
    for kind, parts in snapshot.sharded.items():
        (folder / kind).mkdir()
        save_file(parts, str(folder / kind / f"part-{rank:05d}.safetensors"))
    save_file(snapshot.generators, str(folder / f"rank-{rank:05d}.safetensors"))
    if rank == 0:
        save_file(snapshot.fixed, str(folder / "fixed.safetensors"))
        (folder / "state.json").write_text(json.dumps(snapshot.position, indent=1))


def _from_files(folder: Path, rank: int) -> Snapshot:
    sharded: dict[str, dict[str, Tensor]] = {kind.name: {} for kind in folder.iterdir() if kind.is_dir()}
    for kind, parts in sharded.items():
        for file in sorted((folder / kind).glob("part-*.safetensors")):
            parts |= load_file(str(file))
    generators = folder / f"rank-{rank:05d}.safetensors"
    return Snapshot(
        sharded,
        load_file(str(folder / "fixed.safetensors")),
        load_file(str(generators)) if generators.exists() else {},
        json.loads((folder / "state.json").read_text()),
    )


def _commit_if_complete(
    store: Store, folder: str, position: dict[str, Any], attempt: str, metrics: dict[str, float]
) -> bool:
    lists = [f"{folder}/files-{rank:05d}.json" for rank in range(position["world_size"])]
    if not all(store.exists(path) for path in lists):
        return False
    record = {
        "step": position["step"],
        "attempt": attempt,
        "world_size": position["world_size"],
        "zero_stage": position["zero_stage"],
        "files": [entry for path in lists for entry in from_json(store.read(path))],
        "metrics": metrics,
        "committed_at": time.time(),
    }
    return store.put_once(f"checkpoints/step-{position['step']:08d}/COMMIT.json", to_json(record))


def tidy(store: Store, config: CheckpointConfig, attempt: str, faults_of: int = 0) -> None:
    """After a commit: delete what has expired, and what earlier starts left uncommitted up to it."""
    done = commits(store)
    for step in expired(config, done):
        # The record goes first: what has no record is not a checkpoint, however much of it is left.
        store.delete_tree(f"checkpoints/step-{step:08d}/COMMIT.json")
        faults.maybe("checkpoint.half_deleted", faults_of)
        discard(store, f"checkpoints/step-{step:08d}")
    for folder in orphans(store):
        if not folder.endswith(f"/a-{attempt}") and int(folder.split("/step-")[1][:8]) <= done[-1].step:
            discard(store, folder)


def orphans(store: Store) -> list[str]:
    """Folders of attempts that no record holds, below a run."""
    files = store.list("checkpoints")
    attempts = {m[0] for path in files if (m := re.match(r"checkpoints/step-\d{8}/a-[^/]+", path))}
    held = {c.folder for c in commits(store)} | {c.folder for c in commits(store, "DAMAGED.json")}
    return sorted(attempts - held)


def discard(store: Store, folder: str) -> None:
    """Delete an attempt or a checkpoint, its record and lists first, so that nobody loads or commits half of it."""
    for path in store.list(folder):
        if re.search(r"/(COMMIT|files-\d{5})\.json$", path):
            store.delete_tree(path)
    store.delete_tree(folder)


def restore(engine: Engine, store: Store, warn: Callable[[str], Any]) -> int | None:
    """Load the newest commit whose every file is sound, whatever world size and ZeRO stage wrote it. Collective.

    Every rank fetches what it needs, from ZeRO-1 on its own files if the shape is the same, else all of them, and checks
    them against the record before it opens one. If a file is damaged or missing for any rank, rank 0 says so, sets the
    record aside as `DAMAGED.json` so that the step can be committed anew, and all try the commit before it.

    Returns:
        The step resumed from, or None where there is no commit.

    Raises:
        UserError: there are commits but none is sound, or they are of another model.
    """
    known: list[Any] = [None]
    if engine.world.rank == 0:
        for path in (path for path, commit in records(store).items() if commit is None):
            warn(f"The record {path} is damaged; trying the checkpoint before it.")
            set_aside(store, path)
        known = [commits(store)]
    dist.broadcast_object_list(known, src=0)
    for commit in reversed(known[0]):
        with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
            wrong = _fetch(store, commit, needed(commit, engine), Path(scratch))
            found: list[Any] = [None] * engine.world.world_size
            dist.all_gather_object(found, wrong)
            if not any(found):
                engine.load(_from_files(Path(scratch), engine.world.rank))
                return int(commit.step)
        if engine.world.rank == 0:
            what = next(text for text in found if text)
            warn(f"The checkpoint of step {commit.step} is damaged ({what}); trying the one before it.")
            set_aside(store, f"checkpoints/step-{commit.step:08d}/COMMIT.json")
    if known[0]:
        raise UserError(f"All checkpoints below {store.uri}/checkpoints are damaged; start again in another run.dir.")
    return None


def needed(commit: Commit, engine: Engine) -> list[FileRecord]:
    """The files of a commit that a rank needs to resume."""
    world, stage = engine.world, engine.config.zero_stage
    same = (commit.world_size, commit.zero_stage) == (world.world_size, stage)
    mine = f"-{world.rank:05d}.safetensors"

    def wanted(path: str) -> bool:
        if path.startswith("rank-"):
            return same and path.endswith(mine)  # else generator states are of ranks that are no more
        # At ZeRO-0 a rank holds what all ranks wrote.
        return "/part-" not in path or path.endswith(mine) or not same or stage == 0

    return [f for f in commit.files if wanted(f.path)]


def set_aside(store: Store, path: str) -> None:
    """Make a damaged commit no commit, by the path of its record."""
    store.write(path.replace("COMMIT.json", "DAMAGED.json"), store.read(path))
    store.delete_tree(path)


def load_ema(store: Store, width: float = 0.0) -> tuple[dict[str, Tensor], Commit]:
    """The averaged weights of the newest commit of a run, for inference: flat fp32 tensors by name.

    Args:
        width: of an average that is put together from those that the commits hold (`engine.ema`); 0: the plain one.

    Raises:
        UserError: the run has no commit, or its commits cannot give an average of that width.
        IntegrityError: a file is not what the commit says.
    """
    done = commits(store)
    if not done:
        raise UserError(f"The run {store.uri} has no committed checkpoint; train it first.")
    last = done[-1]
    if not width:
        return _averaged(store, last, "ema") | _of_files(store, last, "fixed.safetensors"), last
    held = [
        (commit, name)
        for commit in done
        for name in sorted({f.path.split("/")[0] for f in commit.files})
        if "ema-" in name
    ]
    if not held:
        raise UserError(
            f"The run {store.uri} has the average of train.engine.ema alone; train with ema_widths=[0.05,0.1]."
        )
    tracks = [(float(commit.step), float(name.removeprefix("ema-"))) for commit, name in held]
    weights, error = combination(tracks, (float(last.step), width))
    if error > TOLERATED:
        raise UserError(
            f"An average of width {width:g} cannot be put together from {len(held)} others (its profile would be off by "
            f"{error:.0%}); choose a width near theirs, or keep more commits by train.checkpoint.keep_every."
        )
    total: dict[str, Tensor] = {}
    for weight, (commit, name) in zip(weights.tolist(), held, strict=True):
        for parameter, tensor in _averaged(store, commit, name).items():
            total[parameter] = total.get(parameter, 0) + weight * tensor.double()
    found = {name: tensor.float() for name, tensor in total.items()}
    return found | _of_files(store, last, "fixed.safetensors"), last


def _averaged(store: Store, commit: Commit, name: str) -> dict[str, Tensor]:
    return join(_of_files(store, commit, f"{name}/"))


def _of_files(store: Store, commit: Commit, prefix: str) -> dict[str, Tensor]:
    """What the files of a commit hold whose paths begin so.

    Raises:
        IntegrityError: a file is not what the commit says.
    """
    files = [f for f in commit.files if f.path.startswith(prefix)]
    with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
        if wrong := _fetch(store, commit, files, Path(scratch)):
            raise IntegrityError(wrong)
        return {name: t for file in files for name, t in load_file(str(Path(scratch) / file.path)).items()}


def _fetch(store: Store, commit: Commit, files: Iterable[FileRecord], into: Path) -> str | None:
    """Copy files of a commit here, checked; returns what is wrong with the first that is not sound."""
    for record in files:
        target = into / record.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            store.at(commit.folder).download(record, target)
        except (IntegrityError, FileNotFoundError) as error:
            return str(error)
    return None
