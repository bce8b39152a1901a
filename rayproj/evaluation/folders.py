"""Models in folders of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
