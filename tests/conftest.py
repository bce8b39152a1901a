"""Which tests may run beside each other under pytest-xdist: `make test` has three workers. And what several files use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.s3 import S3Server


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What brings up clusters runs in one worker, where it mostly waits; other files go whole to whoever is free."""
    for item in items:
        clusters = item.path.parent.name in ("cluster", "runtime") or item.get_closest_marker("xdist_group")
        item.add_marker(pytest.mark.xdist_group("clusters" if clusters else str(item.path)))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """For S3, which is this process's environment for the tests of a file."""
    from tests.support.s3 import s3_server  # here: moto takes a second to import

    with s3_server() as running:
        yield running
