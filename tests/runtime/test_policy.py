"""What became of a start and what is to be done: tables, closed forms and brute force, with times given."""

import errno
import random
import re
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError

from rayproj.errors import Interrupted, NonFiniteLoss, UserError
from rayproj.runtime.policy import (
    BUDGETS,
    Budgets,
    Cause,
    Heartbeat,
    RetryConfig,
    capacity,
    classify,
    next_size,
    one_line,
)
from rayproj.storage.retry import StoreUnavailable


def raised(error: Exception) -> Exception:
    """As `ray.get` raises what a rank raised."""
    return RayTaskError("run", f"Traceback of\n{type(error).__name__}: {error}", error).as_instanceof_cause()


BROKEN = raised(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"))
DEAD = ActorDiedError()
USER = raised(UserError("it is a fish; give a number"))
FULL = raised(OSError(errno.ENOSPC, "No space left on device"))
STORE = raised(StoreUnavailable("s3://b did not answer"))
NAN = raised(NonFiniteLoss("at step 7"))
STOPPED = raised(Interrupted("a person asked"))
HOST_MEMORY = OutOfMemoryError("Task was killed due to the node running low on memory.")
GPU_MEMORY = raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
BUG = raised(KeyError("x"))


@pytest.mark.parametrize(
    ("errors", "node_lost", "cause", "shows"),
    [
        ([BROKEN, DEAD, BROKEN], False, Cause.failure, DEAD),
        ([BROKEN, DEAD], True, Cause.node_lost, DEAD),
        ([BROKEN, ActorUnavailableError("lost", None)], True, Cause.node_lost, None),
        ([BUG, BROKEN], True, Cause.failure, BUG),  # a node went away, but nobody died of it
        ([BROKEN, BUG], False, Cause.failure, BROKEN),
        ([DEAD, BROKEN, USER], True, Cause.user, USER),
        ([BROKEN, FULL], False, Cause.user, FULL),
        ([STORE, USER], False, Cause.user, USER),
        ([NAN, NAN], False, Cause.not_finite, NAN),
        ([BROKEN, STORE], False, Cause.store, STORE),
        ([DEAD, STORE], True, Cause.store, STORE),
        ([STOPPED, BROKEN], False, Cause.stopped, STOPPED),
        ([BROKEN, HOST_MEMORY], False, Cause.out_of_memory, HOST_MEMORY),
        ([BROKEN, GPU_MEMORY], False, Cause.out_of_memory, GPU_MEMORY),
        ([BUG], False, Cause.failure, BUG),
    ],
)
def test_the_error_that_says_most_names_the_cause(
    errors: list[Exception], node_lost: bool, cause: Cause, shows: Exception | None
) -> None:
    found, error = classify(errors, node_lost)
    assert found is cause
    assert shows is None or error is shows


def test_each_kind_of_trouble_has_its_own_budget() -> None:
    budgets = Budgets(RetryConfig(max_failures=3, max_hangs=1, max_store_failures=2))
    assert [budgets.charge(Cause.failure, 4) for _ in range(4)] == [True, True, True, False]
    assert [budgets.charge(Cause.hang, 4) for _ in range(2)] == [True, False]
    assert [budgets.charge(Cause.store, 4) for _ in range(3)] == [True, True, False]
    assert not budgets.charge(Cause.out_of_memory, 4), "a process that ran out of memory died, too"


def test_a_new_commit_refills_every_budget_and_an_old_one_none() -> None:
    budgets = Budgets(RetryConfig(max_failures=1, max_hangs=1))
    assert budgets.charge(Cause.failure, 4) and budgets.charge(Cause.hang, 4)
    assert not budgets.charge(Cause.failure, 4) and not budgets.charge(Cause.failure, 0)
    assert budgets.charge(Cause.failure, 5) and budgets.charge(Cause.hang, 5)
    assert not budgets.charge(Cause.hang, 5)


def test_a_budget_of_minus_one_is_endless_and_growing_costs_nothing() -> None:
    budgets = Budgets(RetryConfig(max_preemptions=-1, max_failures=0))
    assert all(budgets.charge(cause, 0) for _ in range(100) for cause in (Cause.node_lost, Cause.drained, Cause.grown))
    assert not budgets.charge(Cause.failure, 0)
    limited = Budgets(RetryConfig(max_preemptions=1))
    assert limited.charge(Cause.drained, 0) and not limited.charge(Cause.node_lost, 0)


def test_every_cause_that_a_new_start_may_cure_has_a_budget() -> None:
    never = {Cause.stopped, Cause.user, Cause.not_finite}
    assert set(BUDGETS) == set(Cause) - never - {Cause.grown}


def test_a_group_without_a_sign_of_life_is_overdue_after_the_floor() -> None:
    heart = Heartbeat(floor=10)
    assert not heart.overdue(1e9), "no rank has begun"
    heart.beat(0, 100.0)
    assert not heart.overdue(110.0) and heart.overdue(110.1)
    heart.beat(1, 100.5)
    assert not heart.overdue(110.5) and heart.overdue(110.6)
    heart.beat(None, 111.0)
    assert not heart.overdue(1e9), "past the last step"


def test_slow_steps_get_ten_times_their_length() -> None:
    heart = Heartbeat(floor=10)
    for step in range(5):
        heart.beat(step, 100.0 * step)
    assert not heart.overdue(400 + 1000) and heart.overdue(400 + 1001)
    heart.beat(4, 450.0)  # a sign of life without a step; the next step took 100 s from it
    heart.beat(6, 650.0)
    assert heart.step_seconds == pytest.approx(100.0)
    heart.beat(7, 650.0 + 200.0)
    assert heart.step_seconds == pytest.approx(0.9 * 100 + 0.1 * 200)


def test_a_rank_that_is_behind_does_not_set_the_step_back() -> None:
    heart = Heartbeat(floor=1)
    heart.beat(5, 0.0)
    heart.beat(3, 1.0)
    heart.beat(6, 2.0)
    assert heart.step == 6 and heart.step_seconds == pytest.approx(1.0)


def test_the_next_size_is_the_largest_allowed_that_fits() -> None:
    for wanted, room, batch in product(range(1, 9), range(10), (None, 6, 8)):
        worlds = None if batch is None else [n for n in range(1, batch + 1) if batch % n == 0]
        expected = 0
        for n in range(1, wanted + 1):
            if n <= room and (worlds is None or n in worlds):
                expected = n
        assert next_size(wanted, room, worlds) == expected


def test_capacity_is_what_filling_the_nodes_one_by_one_gives() -> None:
    """In tenths, which are not exact in binary, as `cluster.cpus_per_rank=0.1` is."""
    draw = random.Random(0)
    for _ in range(300):
        tenths = {"CPU": draw.randint(1, 12), **({"GPU": draw.randint(0, 5)} if draw.random() < 0.5 else {})}
        nodes = [
            {kind: draw.randint(0, 40) for kind in ("CPU", "GPU", "memory") if draw.random() < 0.8}
            for _ in range(draw.randint(0, 4))
        ]
        expected = 0
        for node in nodes:
            left = {kind: Fraction(node.get(kind, 0), 10) for kind in tenths}
            while all(left[kind] >= Fraction(need, 10) for kind, need in tenths.items()):
                left = {kind: left[kind] - Fraction(need, 10) for kind, need in tenths.items()}
                expected += 1
        free = [{kind: amount / 10 for kind, amount in node.items()} for node in nodes]
        assert capacity({kind: need / 10 for kind, need in tenths.items()}, free) == expected, (tenths, nodes)


@pytest.mark.parametrize(
    ("cause", "error", "says"),
    [
        (Cause.out_of_memory, HOST_MEMORY, r"out of memory .*smaller train\.micro_batch"),
        (Cause.node_lost, DEAD, "A node was lost"),
        (Cause.hang, None, "hung"),
        (Cause.drained, None, "being drained.*have committed"),
        (Cause.grown, None, "room for more ranks"),
        (Cause.failure, DEAD, "A rank's process died"),
        (Cause.failure, BUG, r"A rank failed with KeyError: 'x'"),
        (Cause.store, STORE, r"A rank failed with StoreUnavailable: s3://b did not answer"),
        (Cause.user, USER, "it is a fish; give a number"),
    ],
)
def test_what_happened_is_one_line_with_its_remedy(cause: Cause, error: Any, says: str) -> None:
    line = one_line(cause, error)
    assert re.search(says, line) and "\n" not in line
