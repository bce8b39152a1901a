"""Data order: every sample once an epoch, and the same global batches at any world size."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayproj.data import watermark
from rayproj.data.dataset import Dataset
from rayproj.data.loader import Batches, Bucketed, Streamed
from rayproj.data.order import Buckets, Mixed, Shuffled, epoch_order, order_of
from rayproj.data.reader import Joined, Reader
from rayproj.errors import UserError
from tests.support import images


@pytest.mark.parametrize(("num_samples", "shard_size"), [(1, 1), (7, 3), (64, 8), (1000, 7), (1000, 2000), (129, 128)])
def test_an_epoch_is_a_permutation(num_samples: int, shard_size: int) -> None:
    for epoch in range(3):
        assert sorted(epoch_order(num_samples, shard_size, 5, epoch)) == list(range(num_samples))
    if num_samples > 20:
        assert not np.array_equal(
            epoch_order(num_samples, shard_size, 5, 0), epoch_order(num_samples, shard_size, 5, 1)
        )
        assert not np.array_equal(
            epoch_order(num_samples, shard_size, 5, 0), epoch_order(num_samples, shard_size, 6, 0)
        )


def test_reads_stay_within_windows_of_shards() -> None:
    order = epoch_order(1000, 10, 0, 0, window_shards=4)
    for begin in range(0, 1000, 40):
        assert len(set(order[begin : begin + 40] // 10)) <= 4


def test_batches_are_consecutive_parts_of_the_stream_of_epochs() -> None:
    order = Shuffled(10, 4, 4, seed=3)
    stream = np.concatenate([order.indices(step) for step in range(10)])
    assert np.array_equal(stream[:10], epoch_order(10, 4, 3, 0))
    assert np.array_equal(stream[10:20], epoch_order(10, 4, 3, 1))
    assert np.array_equal(order.indices(7), stream[28:32])


def test_a_dataset_in_the_making_is_first_read_in_order() -> None:
    order = Shuffled(10, 4, 5, seed=3, first_epoch_in_order=True)
    assert np.array_equal(np.concatenate([order.indices(0), order.indices(1)]), np.arange(10))
    assert np.array_equal(np.concatenate([order.indices(2), order.indices(3)]), epoch_order(10, 4, 3, 1))


def test_ranks_share_the_same_global_batch_at_any_world_size(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dataset = images.write(str(tmp_path))
    sampling = Shuffled(50, 16, 12, seed=1)
    for step in (0, 3, 4):
        whole = Batches(Reader(dataset), sampling, 0, 1).at(step)
        assert torch.equal(whole["row"][:, 0], torch.from_numpy(sampling.indices(step)))
        assert (whole["row"][:, 1] == step).all() and (whole["row"][:, 2] == 0).all()
        for world_size in (2, 3, 5):
            parts = [Batches(Reader(dataset), sampling, rank, world_size).at(step) for rank in range(world_size)]
            for name, tensor in whole.items():
                assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_each_bucket_has_its_share_of_the_steps() -> None:
    sizes, batch = [70, 25, 10], 8
    drawn = [Buckets(sizes, batch, seed=3).at(step) for step in (0, 500, 1399)]
    buckets = Buckets(sizes, batch, seed=3)
    found = [buckets.at(step) for step in range(1400)]  # 100 rounds of ceil(105 / 8)
    assert drawn == [found[0], found[500], found[1399]], "a function of the step alone"
    for bucket, size in enumerate(sizes):
        numbers = [number for b, number in found if b == bucket]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) == pytest.approx(1400 * size / 105, abs=25)
        each = [sum(b == bucket for b, _ in found[i : i + 14]) for i in range(0, 1400, 14)]
        assert set(each) <= {math.floor(14 * size / 105), math.ceil(14 * size / 105)}
    assert [b for b, _ in found[:14]] != [b for b, _ in found[14:28]]


def test_a_batch_of_one_bucket_is_shared_by_all_ranks(tmp_path) -> None:  # type: ignore[no-untyped-def]
    datasets = [images.write(str(tmp_path / name), num_samples=n) for name, n in (("a", 50), ("b", 20))]
    orders, buckets = [order_of(dataset, 12, 1) for dataset in datasets], Buckets([50, 20], 12, 1)

    def batches(rank: int, ranks: int) -> Bucketed:
        return Bucketed([Batches(Reader(d), o, rank, ranks) for d, o in zip(datasets, orders, strict=True)], buckets)

    whole, parts, seen = batches(0, 1), [batches(rank, 2) for rank in range(2)], set()
    for step in (4, 5, 6, 7, 2):
        bucket, number = buckets.at(step)
        batch, halves = whole.at(step), [part.at(step) for part in parts]
        seen.add(bucket)
        assert np.array_equal(batch["row"][:, 0], orders[bucket].indices(number)) and (batch["row"][:, 1] == step).all()
        assert [len(half["row"]) for half in halves] == [6, 6]
        for name, tensor in batch.items():
            assert torch.equal(torch.cat([half[name] for half in halves]), tensor)
    assert seen == {0, 1}


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.07, 0.03)])
def test_mixed_batches_have_their_shares_and_each_dataset_its_own_epochs(shares: tuple[float, ...]) -> None:
    sizes, batch, steps = (50, 31, 7)[: len(shares)], 24, 1000
    orders = [Shuffled(n, 8, batch, seed=2) for n in sizes]
    mixed, starts = Mixed(orders, shares, batch, seed=4), np.cumsum([0, *sizes])
    late = Mixed(orders, shares, batch, seed=4).indices(700)
    batches = [mixed.indices(step) for step in range(steps)]
    assert np.array_equal(batches[700], late), "a function of the step alone"
    which = np.searchsorted(starts, np.stack(batches), side="right") - 1
    for number, (share, order) in enumerate(zip(shares, orders, strict=True)):
        counts = (which == number).sum(1)
        assert set(counts) <= {math.floor(batch * share), math.ceil(batch * share)}
        assert counts.mean() == pytest.approx(batch * share, abs=4 * 0.5 / steps**0.5)
        read = [np.sort(b[w == number] - starts[number]) for b, w in zip(batches, which, strict=True)]
        ends = np.cumsum([0, *counts])
        assert all(
            np.array_equal(r, np.sort(order.stream(a, b))) for r, a, b in zip(read, ends, ends[1:], strict=False)
        )
    assert mixed.position(700) == (which[:700] == 0).sum()


def test_joined_datasets_are_read_as_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    datasets = [images.write(str(tmp_path / name), num_samples=n) for name, n in (("a", 20), ("b", 9))]
    joined = Joined([Reader(dataset, ["image", "label"]) for dataset in datasets])
    found = joined.gather(np.array([28, 3, 20, 19]))
    expected = [(1, 8), (0, 3), (1, 0), (0, 19)]
    for k, (which, index) in enumerate(expected):
        own = Reader(datasets[which]).gather(np.array([index]))
        assert np.array_equal(found["image"][k], own["image"][0]) and found["label"][k] == own["label"][0]
    assert found["index"].tolist() == [28, 3, 20, 19]
    other = replace(images.header(8, 8), classes=("x", "y", "z"))
    with pytest.raises(UserError, match="cannot be mixed: their classes"):
        Joined([Reader(datasets[0], ["label"]), Reader(Dataset.create(str(tmp_path / "c"), other), ["label"])])


def test_a_streaming_consumer_says_how_far_it_is(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dataset = images.write(str(tmp_path))
    order = Shuffled(50, 16, 10, seed=1, first_epoch_in_order=True)
    stream = Streamed(Batches(Reader(dataset), order, 0, 1), order, dataset, "c")
    told = []
    for step in range(6):
        stream.at(step)
        told.append(watermark.watermarks(dataset)["c"])
    assert told == [0, 0, 1, 1, 2, 4]
