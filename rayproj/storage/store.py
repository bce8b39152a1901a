"""A folder on any fsspec filesystem, with the one primitive that commits need: exclusive create."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from rayproj.errors import UserError
from rayproj.storage.retry import http_status, persist

PATIENCE = 60.0  # seconds that one change of a store may take, and more by its size:
SLOWEST = 1 << 20  # bytes per second
MARK = "rayproj-put"

_log = logging.getLogger("rayproj")
_exclusive: dict[tuple[int, str], bool] = {}  # by filesystem and bucket

Result = TypeVar("Result")


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

    Nothing is ever appended to, and only `write` replaces. Instances are small, picklable and survive a fork. What is
    written is seen at once by every other process: nothing is remembered.

    Every operation is tried again while the store is away (`rayproj.storage.retry`), and raises StoreUnavailable if that
    lasts too long, and UserError where there is no such bucket or no permission.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._filesystem, path = fsspec.url_to_fs(str(uri), use_listings_cache=False)
        except ImportError as error:
            raise UserError(f"'{uri}' needs a package that is not here: {error}.") from error
        self._pid = os.getpid()
        self._root = path.rstrip("/")
        protocols = _protocols(self._filesystem)
        self._local, self._memory, self._s3 = "file" in protocols, "memory" in protocols, "s3" in protocols
        self.uri = self._root if self._local else str(self._filesystem.unstrip_protocol(self._root))
        if self._s3:  # its own retries, twice over, have long pauses and say nothing
            self._filesystem.retries = 1
            self._filesystem.config_kwargs.setdefault("retries", {"total_max_attempts": 1})

    @property
    def _fs(self) -> Any:
        if self._pid != os.getpid():  # a filesystem's thread does not survive a fork
            self.__init__(self.uri)  # type: ignore[misc]
        return self._filesystem

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

    def _persist(self, operation: Callable[[], Result]) -> Result:
        return persist(operation, self.uri)

    def _change(self, operation: str, *args: Any, size: int = 0, **kwargs: Any) -> Any:
        """Call a method of the filesystem that sends something.

        aiohttp has no time limit while it sends, and at times none for the answer to what was sent after a '100
        Continue': a server that falls silent would hold us for ever.
        """
        if not self._fs.async_impl:
            return getattr(self._fs, operation)(*args, **kwargs)
        method = getattr(self._fs, f"_{operation}")
        return sync(self._fs.loop, method, *args, timeout=PATIENCE + size / SLOWEST, **kwargs)

    @property
    def exclusive(self) -> bool:
        """Whether exclusive create is exclusive here. Tried out once per process and bucket where it is not known."""
        if self._local or self._memory:
            return True
        bucket = self._root.lstrip("/").split("/")[0]
        key = (hash(self._fs), bucket)
        if key not in _exclusive:
            _exclusive[key] = self._persist(self.probe)
            if not _exclusive[key]:
                _log.warning(
                    "The store %s does not honour conditional writes: of two processes that create the same file at "
                    "once, both believe to have won. Commits are safe only while one driver works on a run; see to "
                    "that, or use a store that has them (AWS S3, Google Cloud Storage, a current MinIO or Ceph).",
                    self.uri,
                )
        return _exclusive[key]

    def probe(self) -> bool:
        """Try out whether the second of two creators is refused and the content of the first is kept."""
        path = self._path(f".probe-{uuid.uuid4().hex}.tmp")  # in the folder, where we may write; `list` leaves it out
        try:
            self._create(path, b"1")
            self._create(path, b"2")
            return False
        except FileExistsError:
            return bool(self._fs.cat_file(path) == b"1")
        except (OSError, NotImplementedError, TypeError) as error:
            if isinstance(error, OSError) and http_status(error) not in (400, 405, 501):
                raise
            return False
        finally:
            with suppress(FileNotFoundError):
                self._change("rm_file", path)

    def put_once(self, path: str, data: bytes) -> bool:
        """Create a file with its whole content, unless there is one.

        Returns:
            False if somebody else already had created it; theirs is untouched.
        """
        target = self._path(path)
        if self._local:
            staged = self._persist(lambda: _stage(Path(target), data))
            try:
                return self._persist(lambda: _link(staged, Path(target)))
            finally:
                staged.unlink()
        exclusive, mark, unsure = self.exclusive, uuid.uuid4().hex, False

        def attempt() -> bool:
            nonlocal unsure
            try:
                if exclusive:
                    self._create(target, data, mark)
                elif self._fs.exists(target):
                    raise FileExistsError(target)
                else:
                    self._put(target, data, mark)
                return True
            except FileExistsError:  # created by an attempt of ours, perhaps, whose answer was lost
                with suppress(FileNotFoundError):
                    # On S3 a mark says so, since aiohttp repeats a PUT without our noticing.
                    return bool(
                        self._fs.metadata(target).get(MARK) == mark
                        if self._s3
                        else unsure and self._fs.cat_file(target) == data
                    )
                return False
            except Exception:
                unsure = True
                raise

        return self._persist(attempt)

    def _create(self, target: str, data: bytes, mark: str = "") -> None:
        """Raises FileExistsError."""
        try:
            self._put(target, data, mark, mode="create")
        except OSError as error:
            if http_status(error) == 412:  # s3fs recognises the answer of AWS alone
                raise FileExistsError(target) from error
            raise

    def _put(self, target: str, data: bytes, mark: str = "", **kwargs: Any) -> None:
        if self._s3 and mark:
            kwargs["Metadata"] = {MARK: mark}
        self._change("pipe_file", target, data, size=len(data), **kwargs)

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, all at once; only for what may change, such as a report."""
        target = self._path(path)
        if self._local:
            self._persist(lambda: os.replace(_stage(Path(target), data), target))
        else:
            self._persist(lambda: self._put(target, data))

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return self._persist(lambda: bytes(self._fs.cat_file(self._path(path))))

    def parsed(self, path: str, parse: Callable[[bytes], Result] = from_json) -> Result:
        """What `parse` makes of a file. Raises FileNotFoundError, and UserError where the file is damaged."""
        data = self.read(path)
        try:
            return parse(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"'{self.uri}/{path}' is damaged and cannot be read ({type(error).__name__}: {error}); put it back from a "
                "copy, or make the folder again."
            ) from error

    def exists(self, path: str) -> bool:
        # Not the filesystem's `exists`: s3fs' says False to whatever goes wrong with a bucket.
        try:
            self._persist(lambda: self._fs.info(self._path(path)))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Every file below a folder, relative to this store, sorted; none that is still being written."""
        return sorted(path for path in self.sizes(prefix) if not path.endswith(".tmp"))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by path relative to this store; those that are still being written too."""
        try:
            found = self._persist(lambda: self._fs.find(self._path(prefix), detail=True))
        except FileNotFoundError:
            return {}
        # Consoles of S3 make folders as empty files with a "/"; a folder that fills just now s3fs finds as itself.
        files = {str(path)[len(self._root) + 1 :]: info for path, info in found.items() if info["type"] == "file"}
        return {path: info["size"] for path, info in files.items() if path and not path.endswith("/")}

    def modified(self, path: str) -> float:
        """When a file was last written, in unix seconds. Raises FileNotFoundError."""
        return float(self._persist(lambda: self._fs.modified(self._path(path))).timestamp())

    def delete_tree(self, prefix: str) -> None:
        """Delete a file or a folder with all below it; nothing there is fine."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._change("rm", self._path(prefix), recursive=True)
            if not self._local and self._fs.find(self._path(prefix)):  # s3fs is silent about what S3 did not delete
                raise OSError(errno.EBUSY, "still there after its deletion", self._path(prefix))

        self._persist(delete)

    def upload(self, local: Path, path: str) -> FileRecord:
        """Copy a local file here and hash it; `path` is one that nobody else writes."""
        record, target = _record(local, path), self._path(path)
        if self._local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        self._persist(lambda: self._change("put_file", str(local), target, size=record.size))
        if self._local:  # a record that names this file must not outlive it in a loss of power
            _sync(Path(target))
            _sync(Path(target).parent)
        return record

    def download(self, record: FileRecord, local: Path) -> None:
        """Copy a file from here and check it against its record.

        Raises:
            IntegrityError: its size or hash is another; the local copy is gone.
            FileNotFoundError: it is not there.
        """
        try:
            self._persist(lambda: self._fs.get_file(self._path(record.path), str(local)))
        except FileNotFoundError as error:  # whose text is at most a path
            raise FileNotFoundError(f"{self.uri}/{record.path} is not there") from error
        try:
            self._require(record, _record(local, record.path))
        except IntegrityError:
            local.unlink()
            raise

    def check(self, record: FileRecord) -> None:
        """Read a file and check it against its record, without keeping it. Raises as `download` does."""

        def read() -> FileRecord:
            with self._fs.open(self._path(record.path), "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
                # Not `tell`: a digest of what is in memory does not move.
                return FileRecord(record.path, content.seek(0, os.SEEK_END), digest)

        self._require(record, self._persist(read))

    def _require(self, record: FileRecord, found: FileRecord) -> None:
        if found != record:
            raise IntegrityError(
                f"{self.uri}/{record.path} has {found.size} bytes and sha256 {found.sha256[:12]}…, "
                f"its record says {record.size} bytes and {record.sha256[:12]}…"
            )


def _record(file: Path, path: str) -> FileRecord:
    with file.open("rb") as content:
        return FileRecord(path, file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())


def _stage(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk gets no fuller
        staged.unlink(missing_ok=True)
        raise
    return staged


def _link(staged: Path, target: Path) -> bool:
    """Give a staged file its name unless that is taken: the content shows all at once."""
    try:
        os.link(staged, target)
    except FileExistsError:
        if staged.stat().st_nlink == 1:  # else NFS had made the link and lost the answer
            return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(
                f"The filesystem of {target.parent} has no hard links, which commits need; "
                "use another folder, or the bucket itself (s3://, gs://) where this is one that is mounted."
            ) from error
        raise
    _sync(target.parent)
    return True


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _sync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
