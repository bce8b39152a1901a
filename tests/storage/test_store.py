"""What every back end of a store must do; one conformance test per promise."""

import pickle
import threading
import time
import uuid
from pathlib import Path

import pytest

from rayproj.storage.store import FileRecord, IntegrityError, Store, from_json, sha256_hex, to_json


@pytest.fixture(params=["local", "file-uri", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return Store(f"s3://{request.getfixturevalue('server').bucket()}/folder")
    uris = {"local": str(tmp_path), "file-uri": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}
    return Store(uris[request.param])


def test_what_is_put_once_stays(store: Store) -> None:
    assert store.put_once("a/b.json", b"first")
    assert not store.put_once("a/b.json", b"second")
    assert store.read("a/b.json") == b"first"
    assert store.list() == ["a/b.json"]


def test_of_many_creators_exactly_one_wins_and_its_content_is_whole(store: Store) -> None:
    for round_ in range(20):
        contents = [bytes([i]) * 100_000 for i in range(4)]
        barrier, won = threading.Barrier(4), []

        def create(data: bytes, name: str = f"r{round_}", barrier=barrier, won=won) -> None:  # type: ignore[no-untyped-def]
            barrier.wait()
            if store.put_once(name, data):
                won.append(data)

        threads = [threading.Thread(target=create, args=(data,)) for data in contents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if store.uri.startswith(
            "memory:"
        ):  # fsspec's memory filesystem is not made for threads; processes are what counts
            assert store.read(f"r{round_}") in contents
        else:
            assert [store.read(f"r{round_}")] == won


def test_write_replaces(store: Store) -> None:
    store.write("report.html", b"old")
    store.write("report.html", b"new")
    assert store.read("report.html") == b"new"


def test_a_missing_file(store: Store) -> None:
    assert not store.exists("x")
    with pytest.raises(FileNotFoundError):
        store.read("x")
    store.delete_tree("x")
    assert store.list("x") == []


def test_folders_nest_and_lists_are_relative(store: Store) -> None:
    store.at("runs", "one").put_once("c/1", b"1")
    store.at("runs/one").put_once("c/2", b"2")
    assert store.list("runs") == ["runs/one/c/1", "runs/one/c/2"]
    assert store.at("runs").at("one").list("c") == ["c/1", "c/2"]
    store.delete_tree("runs/one/c")
    assert store.list() == []


def test_files_go_and_come_with_their_hash(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    data = bytes(range(256)) * 9000
    source.write_bytes(data)
    record = store.upload(source, "x/data.bin")
    assert record == FileRecord("x/data.bin", len(data), sha256_hex(data))
    store.download(record, target)
    assert target.read_bytes() == data


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:5] + b"!" + d[6:], lambda d: d + b"x"])
def test_a_damaged_file_is_named_and_not_left_behind(store: Store, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    source.write_bytes(b"some bytes that matter")
    record = store.upload(source, "data.bin")
    store.write("data.bin", damage(store.read("data.bin")))
    with pytest.raises(IntegrityError, match=r"data\.bin"):
        store.download(record, target)
    assert not target.exists()
    with pytest.raises(IntegrityError, match=r"data\.bin"):
        store.check(record)


def test_a_lost_file_is_named(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "in.bin"
    source.write_bytes(b"some bytes that matter")
    record = store.upload(source, "a/data.bin")
    store.check(record)
    store.delete_tree("a")
    with pytest.raises(FileNotFoundError, match=r"a/data\.bin is not there"):
        store.download(record, tmp_path / "out.bin")
    with pytest.raises(FileNotFoundError):
        store.check(record)


def test_sizes_and_times_of_all_that_is_there_and_lists_without_what_is_being_written(store: Store) -> None:
    before = time.time()
    store.write("a/b", b"123")
    store.write("a/.b.tmp", b"12")
    assert store.sizes() == {"a/b": 3, "a/.b.tmp": 2} and store.list() == ["a/b"]
    assert before - 2 < store.modified("a/b") < time.time() + 2
    with pytest.raises(FileNotFoundError):
        store.modified("c")


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.put_once("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


def test_json_is_canonical() -> None:
    assert to_json({"b": 1, "a": [1, {"d": 2, "c": "ε"}]}) == to_json({"a": [1, {"c": "ε", "d": 2}], "b": 1})
    assert from_json(to_json({"a": "ε"})) == {"a": "ε"}
