"""Exactly-once production by a pool of real actors."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rayproj.data import watermark
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.runtime.leases import PoisonShard
from rayproj.runtime.producer import Pool, PoolConfig, produce
from tests.support import images

pytestmark = pytest.mark.usefixtures("cluster")
MAKER = "tests.support.entries:Maker"


def make(open_run, tmp_path: Path, consumers: list[str] | None = None, max_ahead: int = 64, **values) -> dict:  # type: ignore[no-untyped-def]
    dataset = Dataset.create(str(tmp_path / "data"), images.header())
    with open_run(1) as run:
        config = {"log": str(tmp_path / "made.log"), **values}
        return produce(run, dataset, MAKER, PoolConfig(max_ahead=max_ahead), config, consumers)


def made(tmp_path: Path) -> list[int]:
    return sorted(int(line) for line in (tmp_path / "made.log").read_text().split())


def test_every_shard_once_though_a_maker_is_killed(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = make(open_run, tmp_path, die_at=2)
    assert (found["samples"], found["shards"], found["made"]) == (50, 4, 4)
    assert made(tmp_path) == [0, 1, 2, 2, 3]
    assert found["manifest"] == images.write(str(tmp_path / "reference")).manifest_hash()
    notes = Reader(Dataset.open(str(tmp_path / "data")), ["note"]).gather(np.arange(50))["note"]
    assert list(notes) == [images.sample(i)["note"] for i in range(50)]


def test_a_pool_makes_one_dataset_after_another_and_nobody_waits_for_who_is_late(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The late maker of a shard of the first is replaced; the others make the second too, by its own values."""
    datasets = [Dataset.create(str(tmp_path / name), images.header(name=name)) for name in ("first", "second")]
    with open_run(1) as run, Pool(run, PoolConfig(actors=2, lease_seconds=1)) as pool:
        for dataset, also in zip(datasets, ({"hang_at": 1}, {}), strict=True):
            values = {"log": str(tmp_path / f"{dataset.header.name}.log"), **also}
            assert pool.produce(dataset, MAKER, values)["made"] == 4
    makers = [set((tmp_path / f"{name}.pids").read_text().split()) for name in ("first", "second")]
    assert len(makers[0]) == 2 and makers[0] & makers[1]
    for dataset in datasets:
        notes = Reader(dataset, ["note"]).gather(np.arange(50))["note"]
        assert list(notes) == [images.sample(i)["note"] for i in range(50)]


def test_only_what_is_missing_is_made(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dataset = Dataset.create(str(tmp_path / "data"), images.header())
    images.commit(dataset, 0)
    images.commit(dataset, 3)
    assert make(open_run, tmp_path)["made"] == 2
    assert made(tmp_path) == [1, 2]


def test_makers_wait_for_the_consumer(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    seen = []

    def consume() -> None:
        dataset = Dataset.open(str(tmp_path / "data"), wait_seconds=20)
        for shards in range(4):
            while dataset.record(shards) is None:
                time.sleep(0.02)
            time.sleep(0.3)
            seen.append(len(dataset.records()))
            watermark.publish(dataset, "reader", shards + 1)

    thread = threading.Thread(target=consume)
    thread.start()
    make(open_run, tmp_path, consumers=["reader"], max_ahead=1)
    thread.join()
    assert seen == [1, 2, 3, 4]


def test_a_shard_that_cannot_be_made_is_set_aside(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    says = "Shard 1 failed 3 times; 3 of 4 are committed.*The last maker failed: ValueError: this shard cannot be made"
    with pytest.raises(PoisonShard, match=says):
        make(open_run, tmp_path, poison=1)
    assert made(tmp_path) == [0, 1, 1, 1, 2, 3]
    assert sorted(Dataset.open(str(tmp_path / "data")).records()) == [0, 2, 3]


def test_a_shard_that_a_consumer_waits_for_in_vain_ends_it(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PoisonShard, match="Shard 1 failed 3 times; 1 of 4 are committed"):
        make(open_run, tmp_path, consumers=["reader"], max_ahead=2, poison=1)


def test_makers_that_cannot_start_end_it(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        RuntimeError, match="3 makers in a row could not be started; the last one failed: KeyError: 'x'"
    ):
        make(open_run, tmp_path, start="KeyError")
    with pytest.raises(UserError, match="The model is gone; train it again"):
        make(open_run, tmp_path, start="UserError")
    assert not (tmp_path / "made.log").exists()


def test_what_the_dead_left_is_swept(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dataset = Dataset.create(str(tmp_path / "data"), images.header())
    dataset.store.put_once("shards/000001-dead.tar", b"half of a shard")
    make(open_run, tmp_path)
    assert {r.object for r in dataset.records().values()} == set(dataset.store.list("shards"))


def test_what_the_user_can_put_right_is_not_retried(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="The model is gone; train it again"):
        make(open_run, tmp_path, user_error=1)
    assert made(tmp_path).count(1) == 1
