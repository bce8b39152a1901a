"""A store in an S3 bucket."""

from __future__ import annotations

import pytest

from rayproj.storage.store import Store
from tests.support.s3 import S3Server


@pytest.fixture
def store(server: S3Server) -> Store:
    return Store(f"s3://{server.bucket()}/folder")
