"""Models in files and in folders of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayproj.errors import UserError


@contextmanager
def loading(what: str, wanted: str) -> Iterator[None]:
    """Around the loading of a model from a folder.

    Args:
        what: the option that names the folder, with the folder.
        wanted: what the folder should hold.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{what} cannot be loaded ({said}); give a folder with {wanted}.") from error


def contents(place: str) -> str:
    """Identifies what a file holds, or all files of a folder but hidden ones, by name: a SHA-256."""
    path, found = Path(place), hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
            found.update(f"{name}\n".encode())
            with file.open("rb") as data:
                found.update(hashlib.file_digest(data, "sha256").digest())
    return found.hexdigest()
