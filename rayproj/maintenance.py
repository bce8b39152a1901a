"""What lies below a folder: checked against its records (`rayproj verify`), and what no record holds (`rayproj gc`)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.engine import checkpoint
from rayproj.errors import UserError
from rayproj.storage.store import FileRecord, IntegrityError, Store

# Whoever works on a run writes an attempt or a shard in far less; what is younger may be about to be committed.
ORPHAN_HOURS = 24.0


@dataclass(frozen=True)
class Verified:
    """A checkpoint or dataset whose every file was read.

    Attributes:
        wrong: a sentence for each file that is not what its record says, and for each record that cannot be read.
        note: what is to be known beside that.
    """

    what: str
    files: int
    size: int  # bytes, by the records
    wrong: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Garbage:
    """What may be deleted: no record holds it, or one that was set aside or has expired."""

    path: str  # of a file or folder, relative to where was looked
    why: str
    size: int  # bytes
    hours: float  # since its last file was written


def _folders(root: Store, pattern: str) -> list[str]:
    """The folders, relative to a root, in which a file matches a pattern."""
    found = (re.fullmatch(rf"(|.*/){pattern}", path) for path in root.sizes())
    return sorted({match[1].rstrip("/") for match in found if match})


def _at(root: Store, folder: str) -> Store:
    return root.at(folder) if folder else root


def verify(uri: str) -> Iterator[Verified]:
    """Read and hash every file of every checkpoint and dataset below a folder.

    Raises:
        UserError: there is none.
    """
    root = Store(uri)
    runs = _folders(root, r"checkpoints/step-\d{8}/COMMIT\.json")
    datasets = _folders(root, r"dataset\.json")
    if not runs and not datasets:
        raise UserError(f"There is neither a checkpoint nor a dataset below '{uri}'; give a folder that has one.")
    for folder in runs:
        run = _at(root, folder)
        for path, commit in checkpoint.records(run).items():
            place = "/".join(filter(None, [folder, path.rpartition("/")[0]]))
            if commit is None:
                yield Verified(place, 0, 0, (f"{run.uri}/{path} cannot be read",))
            else:
                yield _verified(place, run.at(commit.folder), list(commit.files))
    for folder in datasets:
        try:
            dataset = Dataset.open(_at(root, folder).uri)
        except UserError as error:
            yield Verified(folder or root.uri, 0, 0, (str(error),))
            continue
        committed, files, wrong = dataset.committed(), list[FileRecord](), list[str]()
        for shard in committed:
            try:
                if record := dataset.record(shard):
                    files.append(FileRecord(record.object, record.size, record.sha256))
            except UserError as error:
                wrong.append(str(error))
        missing = dataset.header.num_shards - len(committed)
        note = f"{missing} of {dataset.header.num_shards} shards are not made yet" if missing else ""
        yield _verified(folder or dataset.uri, dataset.store, files, note, wrong)


def _verified(
    what: str, store: Store, files: list[FileRecord], note: str = "", unreadable: Iterable[str] = ()
) -> Verified:
    wrong = [*unreadable]
    for record in files:
        try:
            store.check(record)
        except FileNotFoundError:
            wrong.append(f"{store.uri}/{record.path} is missing")
        except IntegrityError as error:
            wrong.append(str(error))
    return Verified(what, len(files), sum(record.size for record in files), tuple(wrong), note)


def garbage(uri: str, now: float, older_than_hours: float = ORPHAN_HOURS) -> list[Garbage]:
    """What may be deleted below a folder. Nothing young.

    Args:
        now: unix seconds.

    Raises:
        UserError: there is nothing at all.
    """
    root = Store(uri)
    sizes = root.sizes()
    if not sizes:
        raise UserError(f"There is nothing below '{uri}'; give a run, a dataset, or a folder of them.")
    found = {path: "left by a process that died while it wrote" for path in sizes if path.endswith(".tmp")}
    for folder in _folders(root, r"checkpoints/step-\d{8}/.*"):
        run, prefix = _at(root, folder), f"{folder}/" if folder else ""
        found |= {prefix + path: "a checkpoint that was never committed" for path in checkpoint.orphans(run)}
        commits = checkpoint.commits(run)
        for commit in checkpoint.commits(run, "DAMAGED.json"):
            if commits and commit.step < commits[-1].step:
                found[prefix + commit.folder] = "a damaged checkpoint, and there is a newer one"
                found[f"{prefix}checkpoints/step-{commit.step:08d}/DAMAGED.json"] = "its record"
        for step in checkpoint.expired(_policy(run), commits):
            found[f"{prefix}checkpoints/step-{step:08d}"] = "older than what train.checkpoint keeps"
    for folder in _folders(root, r"dataset\.json"):
        dataset, prefix = Dataset.open(_at(root, folder).uri), f"{folder}/" if folder else ""
        found |= {prefix + path: "a shard that was never committed" for path in dataset.orphans()}
    listed = [_garbage(root, path, why, sizes, now) for path, why in sorted(found.items())]
    return [one for one in listed if one.hours >= older_than_hours]


def _policy(run: Store) -> checkpoint.CheckpointConfig:
    """What a run keeps, by its config."""
    train = configuration.value(run.read("config.yaml"), "train")
    return configuration.from_dict(checkpoint.CheckpointConfig, train["checkpoint"])


def _garbage(root: Store, path: str, why: str, sizes: dict[str, int], now: float) -> Garbage:
    files = [file for file in sizes if file == path or file.startswith(f"{path}/")]
    newest = max(map(root.modified, files), default=now)
    return Garbage(path, why, sum(sizes[file] for file in files), (now - newest) / 3600)


def collect(uri: str, found: list[Garbage]) -> None:
    """Delete garbage."""
    root = Store(uri)
    for one in found:
        checkpoint.discard(root, one.path)


def print_verified(uri: str) -> int:
    """Print a line for each checkpoint and dataset, and one for each file that is not sound; 1 if there is one, else 0."""
    sound = True
    for one in verify(uri):
        good = not one.wrong
        sound = sound and good
        note = f"; {one.note}" if one.note else ""
        print(
            f"{'ok ' if good else 'BAD'}  {one.what}: {one.files} files, {one.size / 2**20:.1f} MiB{note}", flush=True
        )
        for text in one.wrong:
            print(f"     {text}", flush=True)
    if not sound:
        print("A run passes over a damaged checkpoint when it resumes; a damaged dataset has to be made again.")
    return 0 if sound else 1


def print_garbage(uri: str, older_than_hours: float, dry_run: bool) -> int:
    """Delete what no record holds, or say what would be deleted."""
    found = garbage(uri, time.time(), older_than_hours)
    for one in found:
        print(f"{one.path}: {one.why}; {one.size / 2**20:.1f} MiB, {one.hours:.1f} hours old")
    if not dry_run:
        collect(uri, found)
    what = f"{len(found)} folders and files, {sum(one.size for one in found) / 2**20:.1f} MiB"
    print(f"{what} {'would be' if dry_run else 'were'} deleted; what is younger than {older_than_hours:g} hours stays.")
    return 0
