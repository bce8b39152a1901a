"""Datasets: exactly-once shards, reproducible bytes, and readers that notice damage."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader, ShardTimeout
from rayproj.data.writer import build_tar, commit_shard
from rayproj.errors import UserError
from rayproj.storage.store import IntegrityError
from tests.support import images

ENCODINGS = {"image": "png", "label": "int", "note": "str", "z": "npy"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    dataset = images.write(str(tmp_path))
    assert dataset.complete and dataset.header.num_shards == 4
    order = np.random.default_rng(0).permutation(50)
    found = Reader(Dataset.open(str(tmp_path)), cache_bytes=1).gather(order)
    for position, index in enumerate(order):
        expected = images.sample(int(index))
        assert np.array_equal(found["image"][position], expected["image"])
        assert np.array_equal(found["z"][position], expected["z"])
        assert found["label"][position] == expected["label"] and found["note"][position] == expected["note"]
    assert np.array_equal(found["index"], order)
    counts = dataset.record(0).class_counts  # type: ignore[union-attr]
    assert counts == {"a": 6, "b": 5, "c": 5}


def test_equal_samples_give_equal_bytes_and_keys_are_checked() -> None:
    first = build_tar([images.sample(i) for i in range(5)], ENCODINGS)
    time.sleep(1.1)  # tar times have whole seconds
    assert first == build_tar([images.sample(i) for i in range(5)], ENCODINGS)
    with pytest.raises(ValueError, match="sample key"):
        build_tar([{**images.sample(0), "key": "a.b"}], ENCODINGS)


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    dataset = images.write(str(tmp_path))
    record = dataset.record(1)
    assert record is not None
    found = list(webdataset.WebDataset(str(tmp_path / record.object), shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in found] == [f"{i:08d}" for i in range(16, 32)]
    for s, index in zip(found, range(16, 32), strict=True):
        expected = images.sample(index)
        assert np.array_equal(s["image.png"][..., 0], expected["image"][0])
        assert np.array_equal(s["z.npy"], expected["z"])
        assert s["json"] == {"label": expected["label"], "note": expected["note"]}


def test_a_shard_is_committed_once(tmp_path: Path) -> None:
    dataset = Dataset.create(str(tmp_path), images.header())
    assert images.commit(dataset, 2)
    before = dataset.store.list("shards")
    assert not images.commit(Dataset.open(str(tmp_path)), 2)
    assert dataset.store.list("shards") == before
    with pytest.raises(AssertionError, match="the plan says 16"):
        commit_shard(dataset, 1, [images.sample(0)], "test", 0.0)
    with pytest.raises(UserError, match="has 1 of 4 shards"):
        dataset.manifest_hash()


def test_another_plan_for_the_same_place_is_refused(tmp_path: Path) -> None:
    Dataset.create(str(tmp_path), images.header())
    Dataset.create(str(tmp_path), images.header())
    with pytest.raises(UserError, match=r"already holds another dataset.*num_samples"):
        Dataset.create(str(tmp_path), images.header(num_samples=51))
    with pytest.raises(UserError, match="There is no dataset at"):
        Dataset.open(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("point", ["shard.before_data", "shard.before_commit", "shard.after_commit"])
def test_killed_in_any_gap_the_rest_makes_exactly_the_planned_samples(tmp_path: Path, point: str) -> None:
    code = f"from tests.support import images; images.write({str(tmp_path)!r})"
    env = {**os.environ, "RAYPROJ_FAULT": f"{point}:0:3"}
    root = Path(__file__).resolve().parents[2]
    died = subprocess.run([sys.executable, "-c", code], env=env, cwd=root)
    assert died.returncode == -signal.SIGKILL
    dataset = Dataset.open(str(tmp_path))
    assert len(dataset.records()) == (3 if point == "shard.after_commit" else 2)
    for shard in range(4):
        images.commit(dataset, shard)
    undisturbed = images.write(str(tmp_path / "other"))
    assert dataset.manifest_hash() == undisturbed.manifest_hash()
    assert sorted(Reader(dataset, ["note"]).gather(np.arange(50))["note"]) == sorted(
        images.sample(i)["note"] for i in range(50)
    )


def damaged(dataset: Dataset, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    record = dataset.record(1)
    assert record is not None
    path = tmp_path / record.object
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("change", [lambda d: d[:-700], lambda d: d[:600] + b"?" + d[601:]])
def test_a_damaged_shard_is_named(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    dataset = images.write(str(tmp_path))
    damaged(dataset, tmp_path, change)
    reader = Reader(Dataset.open(str(tmp_path)))
    reader.gather(np.arange(16))
    with pytest.raises(IntegrityError, match="Shard 1 of"):
        reader.gather(np.array([17]))


def test_a_member_that_is_missing_or_does_not_decode_is_named(tmp_path: Path) -> None:
    for name, keep, match in (
        ("missing", lambda m: m.name != "00000003.image.png", "lacks members"),
        ("undecodable", None, r"'00000003\.image\.png' does not decode"),
    ):
        dataset = Dataset.create(str(tmp_path / name), images.header(num_samples=5))
        data = build_tar([images.sample(i) for i in range(5)], ENCODINGS)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=buffer, mode="w") as sink:
            for member in source:
                content = source.extractfile(member).read()  # type: ignore[union-attr]
                if keep is None and member.name == "00000003.image.png":
                    content = b"x" * len(content)
                if keep is None or keep(member):
                    sink.addfile(member, io.BytesIO(content))
        from rayproj.storage.store import sha256_hex, to_json

        dataset.store.put_once("shards/x.tar", buffer.getvalue())
        record = {
            "shard": 0,
            "object": "shards/x.tar",
            "sha256": sha256_hex(buffer.getvalue()),
            "size": 0,
            "samples": 5,
        }
        record |= {"class_counts": {}, "made_by": "test", "seconds": 0.0, "committed_at": 0.0}
        dataset.store.put_once("commits/000000.json", to_json(record))
        with pytest.raises(IntegrityError, match=match):
            Reader(dataset).gather(np.array([0]))


def test_a_reader_waits_for_a_shard_that_is_still_being_made(tmp_path: Path) -> None:
    dataset = Dataset.create(str(tmp_path), images.header())
    thread = threading.Thread(target=lambda: (time.sleep(0.5), images.commit(Dataset.open(str(tmp_path)), 3)))
    thread.start()
    assert Reader(dataset, wait_seconds=20).gather(np.array([49]))["label"][0] == 49 % 3
    thread.join()
    with pytest.raises(ShardTimeout, match=r"Shard 0 of .* was not committed within 0.1 s"):
        Reader(dataset, wait_seconds=0.1).gather(np.array([0]))
