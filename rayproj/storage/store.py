"""A folder on any fsspec filesystem, with the one primitive that commits need: exclusive create."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

CHUNK = 1 << 20


class IntegrityError(RuntimeError):
    """A file is not what its record says."""


@dataclass(frozen=True)
class FileRecord:
    """A file by its path relative to a store, its size in bytes and its hash."""

    path: str
    size: int
    sha256: str


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def to_json(value: Any) -> bytes:
    """Canonical JSON: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def from_json(data: bytes) -> Any:
    return json.loads(data)


class Store:
    """A folder: a local path, file://, memory://, s3://, gs:// or whatever else fsspec knows.

    Nothing is ever appended to, and only `write` replaces. Instances are small and picklable.
    """

    def __init__(self, uri: str) -> None:
        self._fs, path = fsspec.url_to_fs(str(uri))
        self._root = path.rstrip("/")
        self._local = "file" in _protocols(self._fs)

    @property
    def uri(self) -> str:
        return self._root if self._local else str(self._fs.unstrip_protocol(self._root))

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])  # type: ignore[misc]

    def at(self, *parts: str) -> Store:
        """A folder below this one."""
        return Store("/".join([self.uri, *parts]))

    def local_path(self) -> Path | None:
        """The folder itself where the filesystem is this machine's."""
        return Path(self._root) if self._local else None

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def put_once(self, path: str, data: bytes) -> bool:
        """Create a file with its whole content, unless there is one.

        Returns:
            False if somebody else already had created it; theirs is untouched.
        """
        if not self._local:
            try:
                self._fs.pipe_file(self._path(path), data, mode="create")
            except FileExistsError:
                return False
            return True
        target = Path(self._path(path))
        staged = self._stage(target, data)
        try:
            os.link(staged, target)  # fails if it exists, and shows the content all at once
        except FileExistsError:
            return False
        finally:
            staged.unlink()
        _sync_folder(target.parent)
        return True

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, all at once; only for what may change, such as a report."""
        if not self._local:
            self._fs.pipe_file(self._path(path), data)
            return
        target = Path(self._path(path))
        os.replace(self._stage(target, data), target)

    @staticmethod
    def _stage(target: Path, data: bytes) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return staged

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return bytes(self._fs.cat_file(self._path(path)))

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(self._path(path)))

    def list(self, prefix: str = "") -> list[str]:
        """Every file below a folder, relative to this store, sorted."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._path(prefix))
        except FileNotFoundError:
            return []
        relative = (str(path)[len(self._root) + 1 :] for path in found)
        return sorted(path for path in relative if not path.endswith(".tmp"))

    def delete_tree(self, prefix: str) -> None:
        """Delete a file or a folder with all below it; nothing there is fine."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(prefix), recursive=True)

    def upload(self, local: Path, path: str) -> FileRecord:
        """Copy a local file here, hashing on the way; `path` is one that nobody else writes."""
        target = self._path(path)
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with local.open("rb") as source, self._fs.open(target, "wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                sink.write(chunk)
        return FileRecord(path, size, digest.hexdigest())

    def download(self, record: FileRecord, local: Path) -> None:
        """Copy a file from here and check it against its record.

        Raises:
            IntegrityError: its size or hash is another; the local copy is gone.
            FileNotFoundError: it is not there.
        """
        with self._fs.open(self._path(record.path), "rb") as source, local.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
        with local.open("rb") as file:
            found = FileRecord(record.path, local.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        if found != record:
            local.unlink()
            raise IntegrityError(
                f"{self.uri}/{record.path} has {found.size} bytes and sha256 {found.sha256[:12]}…, "
                f"its record says {record.size} bytes and {record.sha256[:12]}…"
            )


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _sync_folder(folder: Path) -> None:
    """A created name is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
