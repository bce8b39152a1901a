"""Which tests may run beside each other under pytest-xdist: `make test` has three workers."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What brings up clusters runs in one worker, where it mostly waits; other files go whole to whoever is free."""
    for item in items:
        clusters = item.path.parent.name in ("cluster", "runtime") or item.get_closest_marker("xdist_group")
        item.add_marker(pytest.mark.xdist_group("clusters" if clusters else str(item.path)))
