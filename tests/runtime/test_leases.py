"""The lease table, with time given."""

import numpy as np

from rayproj.runtime.leases import Leases, slowest


def test_shards_are_granted_in_order_and_once() -> None:
    leases = Leases(3, lease_seconds=10)
    assert [leases.grant(name, 0.0) for name in "abcd"] == [0, 1, 2, None]
    leases.finish(1, 1.0)
    assert leases.grant("b", 1.0) is None and not leases.complete
    leases.finish(0, 1.0)
    leases.finish(2, 1.0)
    assert leases.complete and leases.grant("a", 99.0) is None


def test_what_is_lost_or_late_goes_to_another() -> None:
    leases = Leases(2, lease_seconds=10)
    assert (leases.grant("a", 0.0), leases.grant("b", 0.0)) == (0, 1)
    leases.lose("a")
    assert leases.grant("c", 1.0) == 0
    assert leases.grant("d", 9.9) is None and leases.grant("d", 10.0) == 1
    assert leases.finish(1, 11.0)
    assert not leases.finish(1, 12.0), "the late one comes after all"
    assert leases.done == {1}


def test_late_is_three_times_what_is_usual() -> None:
    leases = Leases(200, lease_seconds=600)
    for shard in range(100):
        assert leases.grant("a", 0.0) == shard
        leases.finish(shard, 20.0 if shard < 96 else 400.0)
        if shard == 3:
            assert leases.deadline == 600, "too few to know"
    assert leases.deadline == 60.0
    assert leases.grant("b", 0.0) == 100
    assert leases.grant("c", 59.9) == 101 and leases.grant("d", 60.0) == 100
    quick = Leases(50, lease_seconds=600)
    for shard in range(20):
        assert quick.grant("a", 0.0) == shard
        quick.finish(shard, 0.1)
    assert quick.deadline == 10.0, "a pause is not late"


def test_shards_that_share_a_batch_go_to_one_holder() -> None:
    leases, given = Leases(12, lease_seconds=600, together=3), {"a": [], "b": []}
    for _ in range(6):
        for holder, shards in given.items():
            shard = leases.grant(holder, 0.0)
            assert shard is not None
            shards.append(shard)
            leases.finish(shard, 1.0)
    assert given == {"a": [0, 1, 2, 6, 7, 8], "b": [3, 4, 5, 9, 10, 11]}
    late = Leases(6, lease_seconds=600, together=3)
    assert [late.grant(name, 0.0) for name in "abc"] == [0, 3, 1], "none waits for a row of its own"
    near = Leases(6, lease_seconds=600, together=3, max_ahead=2)
    assert [near.grant(name, 0.0) for name in "ab"] == [0, 1], "nor does a consumer"


def test_nobody_runs_too_far_ahead_of_the_slowest_consumer() -> None:
    leases = Leases(10, lease_seconds=10, max_ahead=2)
    assert [leases.grant(str(i), 0.0, consumed=0) for i in range(4)] == [0, 1, None, None]
    assert leases.grant("x", 0.0, consumed=1) == 2
    assert slowest({"a": 5, "b": 3, "other": 0}, ["a", "b"]) == 3
    assert slowest({"a": 5}, ["a", "not seen yet"]) == 0


def test_a_poison_shard_is_set_aside_and_the_others_are_made() -> None:
    leases = Leases(3, lease_seconds=10, max_tries=2)
    for _ in range(2):
        assert leases.grant("a", 0.0) == 0
        leases.lose("a", 0)
    assert leases.grant("a", 0.0) == 1
    leases.lose("a")  # while it made nothing: not the shard's fault
    assert leases.grant("a", 0.0) == 1 and leases.grant("b", 0.0) == 2
    leases.finish(1, 1.0)
    leases.finish(2, 1.0)
    assert leases.complete and leases.aside == {0} and leases.grant("a", 99.0) is None


def test_any_sequence_of_events_completes_with_every_shard_done() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        leases, now, held = Leases(8, lease_seconds=5, max_tries=10**6, together=3), 0.0, {}
        while not leases.complete:
            now += rng.exponential(1.0)
            name = f"h{rng.integers(3)}"
            shard = leases.grant(name, now)
            if shard is not None:
                held[name] = shard
            if held and rng.random() < 0.4:
                leases.finish(held.pop(next(iter(held))), now)
            if rng.random() < 0.2:
                leases.lose(name, held.pop(name, None))
        assert leases.done == set(range(8))
