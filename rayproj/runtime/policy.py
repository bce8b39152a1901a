"""How a start of a rank group ended, and what is to be done about it. Pure: errors and times are given."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError

from rayproj.config import below
from rayproj.errors import Interrupted, NonFiniteLoss, UserError
from rayproj.storage.retry import StoreUnavailable


class Cause(Enum):
    """Why a start of a group ended before its work was done."""

    stopped = "stopped"  # a person asked
    drained = "drained"  # a node is to go away, as on a spot notice; the ranks have committed
    grown = "grown"  # there is room for more ranks again; the ranks have committed
    user = "user"  # something that a person must put right
    not_finite = "not finite"  # the loss; it would be so again
    failure = "failure"  # a rank's process died or raised
    out_of_memory = "out of memory"
    hang = "hang"  # no rank has shown a sign of life for too long
    node_lost = "node lost"  # died, or cannot be reached
    store = "store"  # the store failed for longer than its own retries last


@dataclass
class RetryConfig:
    """How often each kind of trouble is met by a new start from the last commit, without a new commit in between."""

    max_failures: int = 3  # processes that died or raised
    max_hangs: int = 2
    max_store_failures: int = 3
    max_preemptions: int = -1  # nodes drained or lost; -1: without end
    hang_seconds: float = 900.0  # without a sign of life from any rank; never less than ten steps' time

    def problems(self) -> list[str]:
        return below(0, "retry", self, "hang_seconds")


BUDGETS = {
    Cause.failure: "max_failures",
    Cause.out_of_memory: "max_failures",
    Cause.hang: "max_hangs",
    Cause.store: "max_store_failures",
    Cause.node_lost: "max_preemptions",
    Cause.drained: "max_preemptions",
}


@dataclass
class Budgets:
    """What is left of each budget."""

    config: RetryConfig
    spent: Counter[str] = field(default_factory=Counter)
    committed: int = -1  # the last step known to be committed

    def charge(self, cause: Cause, committed: int) -> bool:
        """Charge a new start; False if there is none left for this cause. Progress refills all budgets."""
        if committed > self.committed:
            self.committed = committed
            self.spent.clear()
        if cause is Cause.grown:
            return True
        name = BUDGETS[cause]
        self.spent[name] += 1
        most = getattr(self.config, name)
        return most < 0 or self.spent[name] <= most


def classify(errors: Iterable[BaseException], node_lost: bool) -> tuple[Cause, BaseException]:
    """The cause that explains the ranks' errors, and the error that shows it.

    A dead peer shows on the other ranks as a broken connection, so what says most wins: what a person must put right,
    then a full disk, then the store, then a lost node, then a dead process, then whatever was raised.
    """
    found = [(_cause(error, node_lost), error) for error in errors]
    order = [Cause.user, Cause.not_finite, Cause.store, Cause.stopped, Cause.out_of_memory, Cause.node_lost]
    for cause in order:
        for candidate in found:
            if candidate[0] is cause:
                return candidate
    dead = [candidate for candidate in found if isinstance(candidate[1], RayActorError)]
    return (dead or found)[0]


def _cause(error: BaseException, node_lost: bool) -> Cause:
    original = getattr(error, "cause", None) or error  # Ray wraps what a rank raised
    if isinstance(original, UserError) or is_full_disk(error):
        return Cause.user
    if isinstance(original, NonFiniteLoss):
        return Cause.not_finite
    if isinstance(original, StoreUnavailable):
        return Cause.store
    if isinstance(original, Interrupted):
        return Cause.stopped
    if isinstance(error, OutOfMemoryError) or "memory pressure" in str(error) or "out of memory" in str(error):
        return Cause.out_of_memory
    if isinstance(error, RayActorError) and (node_lost or "node has died" in str(error)):
        return Cause.node_lost
    return Cause.failure


def is_full_disk(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def one_line(cause: Cause, error: BaseException | None) -> str:
    """What happened, for a person."""
    if cause is Cause.node_lost:
        return "A node was lost"
    if cause is Cause.hang:
        return "The ranks hung"
    if cause is Cause.drained:
        return "A node is being drained; the ranks have committed"
    if cause is Cause.grown:
        return "The cluster has room for more ranks; these have committed"
    if cause is Cause.out_of_memory:
        return "A rank ran out of memory (a smaller train.micro_batch needs less)"
    original: Any = getattr(error, "cause", None) or error
    if isinstance(error, RayActorError):
        return "A rank's process died"
    text = str(original).strip().splitlines()
    return f"A rank failed with {type(original).__name__}: {text[-1] if text else ''}"


@dataclass
class Heartbeat:
    """Signs of life of a group. A rank that waits for a peer shows none, so any rank's will do for all."""

    floor: float  # seconds
    since: float | None = None  # the last sign; None: no rank has begun, or all are past their last step
    step: int = 0
    step_seconds: float = 0.0  # moving average

    def beat(self, step: int | None, now: float) -> None:
        """A rank has shown a sign of life after a step; None: it is past its last."""
        if step is None:
            self.since = None
            return
        if self.since is not None and step > self.step:
            took = (now - self.since) / (step - self.step)
            self.step_seconds = took if not self.step_seconds else 0.9 * self.step_seconds + 0.1 * took
        self.since, self.step = now, max(step, self.step)

    def overdue(self, now: float) -> bool:
        return self.since is not None and now - self.since > max(self.floor, 10 * self.step_seconds)


def next_size(wanted: int, capacity: int, worlds: Iterable[int] | None) -> int:
    """The most ranks, at most `wanted`, that fit and that the batch divides over; 0 if none do."""
    allowed = range(1, wanted + 1) if worlds is None else [n for n in worlds if n <= wanted]
    return max((n for n in allowed if n <= capacity), default=0)


def capacity(bundle: dict[str, float], nodes: Iterable[dict[str, float]]) -> int:
    """How many bundles fit on nodes with these free resources."""
    # 0.3 holds 0.1 three times, which floats deny; Ray itself counts in 1/10000.
    return sum(int(min(free.get(k, 0.0) / need for k, need in bundle.items() if need) + 1e-6) for free in nodes)
