"""The lease table, with time given."""

import numpy as np
import pytest

from rayproj.runtime.leases import Leases, PoisonShard, slowest


def test_shards_are_granted_in_order_and_once() -> None:
    leases = Leases(3, lease_seconds=10)
    assert [leases.grant(name, 0.0) for name in "abcd"] == [0, 1, 2, None]
    leases.finish(1)
    assert leases.grant("b", 1.0) is None and not leases.complete
    leases.finish(0)
    leases.finish(2)
    assert leases.complete and leases.grant("a", 99.0) is None


def test_what_is_lost_or_late_goes_to_another() -> None:
    leases = Leases(2, lease_seconds=10)
    assert (leases.grant("a", 0.0), leases.grant("b", 0.0)) == (0, 1)
    leases.lose("a")
    assert leases.grant("c", 1.0) == 0
    assert leases.grant("d", 9.9) is None and leases.grant("d", 10.0) == 1
    leases.finish(1)
    leases.finish(1)
    assert leases.done == {1}


def test_nobody_runs_too_far_ahead_of_the_slowest_consumer() -> None:
    leases = Leases(10, lease_seconds=10, max_ahead=2)
    assert [leases.grant(str(i), 0.0, consumed=0) for i in range(4)] == [0, 1, None, None]
    assert leases.grant("x", 0.0, consumed=1) == 2
    assert slowest({"a": 5, "b": 3, "other": 0}, ["a", "b"]) == 3
    assert slowest({"a": 5}, ["a", "not seen yet"]) == 0


def test_a_poison_shard_is_named() -> None:
    leases = Leases(2, lease_seconds=10, max_tries=2)
    for _ in range(2):
        assert leases.grant("a", 0.0) == 0
        leases.lose("a")
    with pytest.raises(PoisonShard, match="Shard 0 failed 2 times"):
        leases.grant("a", 0.0)


def test_any_sequence_of_events_completes_with_every_shard_done() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        leases, now, held = Leases(8, lease_seconds=5, max_tries=10**6), 0.0, {}
        while not leases.complete:
            now += rng.exponential(1.0)
            name = f"h{rng.integers(3)}"
            shard = leases.grant(name, now)
            if shard is not None:
                held[name] = shard
            if held and rng.random() < 0.4:
                leases.finish(held.pop(next(iter(held))))
            if rng.random() < 0.2:
                leases.lose(name)
                held.pop(name, None)
        assert leases.done == set(range(8))
