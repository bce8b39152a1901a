"""A machine's own copies of far shards."""

import os
from pathlib import Path

import numpy as np
import pytest

from rayproj.data.cache import NodeCache
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.storage.store import IntegrityError, sha256_hex
from tests.support import images


def test_a_shard_comes_once_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = images.write("memory://cached/data")
    monkeypatch.setenv("RAYPROJ_CACHE", str(tmp_path))
    read, asked = dataset.store.read, []
    monkeypatch.setattr(dataset.store, "read", lambda path: (asked.append(path), read(path))[1])
    expected = Reader(dataset).gather(np.arange(50))
    shards = [path for path in asked if path.startswith("shards/")]
    assert len(shards) == 4 == len(list(tmp_path.iterdir()))
    again = Reader(dataset).gather(np.arange(50))
    assert [path for path in asked if path.startswith("shards/")] == shards, "the next reader has them here"
    assert all(np.array_equal(again[name], expected[name]) for name in expected)
    victim = tmp_path / dataset.records()[2].sha256
    victim.write_bytes(b"damaged")
    assert np.array_equal(Reader(dataset).gather(np.arange(50))["image"], expected["image"])
    assert sha256_hex(victim.read_bytes()) == victim.name, "fetched again"
    monkeypatch.setattr(dataset.store, "read", lambda path: b"wrong" if path.startswith("shards/") else read(path))
    victim.unlink()
    with pytest.raises(IntegrityError, match="is damaged: another hash"):
        Reader(dataset).gather(np.arange(32, 40))


def test_the_least_used_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, limit=250)
    for k in range(3):
        data = bytes([k]) * 100
        cache.get(sha256_hex(data), lambda data=data: data)
        os.utime(tmp_path / sha256_hex(data), (k, k))
        if k == 1:
            cache.get(sha256_hex(bytes(100)), lambda: pytest.fail("it is there"))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {sha256_hex(bytes([k]) * 100) for k in (0, 2)}


def test_a_store_on_this_machine_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPROJ_CACHE", str(tmp_path / "cache"))
    Reader(images.write(str(tmp_path / "data"))).gather(np.arange(50))
    assert not (tmp_path / "cache").exists()
    assert Dataset.open(str(tmp_path / "data")).complete
