"""Shards of a far store on this machine's own disk, for all processes on it.

RAYPROJ_CACHE names the folder, without which there is no cache; RAYPROJ_CACHE_GB bounds it, by default at 50.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayproj.storage.store import sha256_hex


@dataclass(frozen=True)
class NodeCache:
    """Files by their hash; the least recently used go first.

    Attributes:
        limit: bytes of all files together.
    """

    folder: Path
    limit: int

    @classmethod
    def of_environment(cls) -> NodeCache | None:
        folder = os.environ.get("RAYPROJ_CACHE")
        return cls(Path(folder), int(float(os.environ.get("RAYPROJ_CACHE_GB", 50)) * 1e9)) if folder else None

    def get(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """The file of this hash, fetched if it is not there or not whole. What is fetched is not checked here."""
        path = self.folder / sha256
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if data and sha256_hex(data) == sha256:
            os.utime(path)
            return data
        data = fetch()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{sha256}.{uuid.uuid4().hex}.part"
        part.write_bytes(data)
        part.replace(path)
        self._make_room(keep=path)
        return data

    def _make_room(self, keep: Path) -> None:
        files = []
        for path in self.folder.iterdir():
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process made room
                continue
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
