"""The supervisor of a rank group: start, watch, and start again from the last commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray

from rayproj.errors import Interrupted, UserError
from rayproj.runtime import interrupt
from rayproj.runtime.alone import fit_alone
from rayproj.runtime.cluster import draining_nodes, free_resources, lost_nodes, silent_nodes
from rayproj.runtime.group import GroupConfig, RankGroup
from rayproj.runtime.placement import Placed, bundle, place, shortage
from rayproj.runtime.policy import (
    Budgets,
    Cause,
    Heartbeat,
    capacity,
    classify,
    is_full_disk,
    next_size,
    one_line,
)
from rayproj.runtime.run import Run

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0  # between looks at the cluster and at the run's folder


@dataclass
class End:
    """How a start of a group ended: with a result, or for a cause."""

    result: Any = None
    cause: Cause | None = None
    error: BaseException | None = None
    committed: int = -1  # the last step that was seen to be committed


def fit(run: Run, entry: str, config: GroupConfig, worlds: Iterable[int] | None = None) -> dict[str, Any]:
    """Run `entry(config, world, link)` on a rank group to its end, through failures.

    A group that loses a rank, hangs or is to lose a node is ended, and another starts from the last commit, on fewer
    ranks if the cluster has shrunk, and on all of them again once it has room.

    Args:
        entry: "package.module:function", imported by the workers.
        worlds: the world sizes that the run can have; None: any.

    Returns:
        What rank 0 returned.

    With no ranks the entry runs here (`fit_alone`).

    Raises:
        UserError, NonFiniteLoss: from a rank; retrying would give the same.
        Interrupted: a stop was asked for, and the ranks have committed.
        RuntimeError: a retry budget is used up.
    """
    if config.ranks == 0:
        return fit_alone(run, entry, config)
    budgets = Budgets(config.retry)
    need = bundle(config.cpus_per_rank, config.gpus_per_rank)
    used: set[str] = set()  # nodes that ranks have been on
    sizes = list(worlds) if worlds is not None else None

    def may_shrink() -> bool:
        return 0 < config.min_ranks < config.ranks or bool(lost_nodes(used) | used & draining_nodes())

    while True:
        interrupt.check()
        placed = _place(run, config, need, sizes, may_shrink)
        used |= set(placed.nodes)
        group = RankGroup(run.id, config, need, placed)
        try:
            end = _Watch(run, group, config, need, sizes).until_end(entry)
        finally:
            group.kill()
        if end.cause is None:
            return end.result
        if end.cause is Cause.stopped:
            raise Interrupted
        if end.cause in (Cause.user, Cause.not_finite):
            assert end.error is not None
            if is_full_disk(end.error):
                raise UserError(
                    f"There is no space left for {run.store.uri}; free some, and run the same command again."
                ) from end.error
            original = getattr(end.error, "cause", None) or end.error
            raise type(original)(*original.args) from end.error  # without Ray's wrapping
        what = one_line(end.cause, end.error)
        if not budgets.charge(end.cause, end.committed):
            times = sum(budgets.spent.values())
            raise RuntimeError(f"{run.id} failed {times} times in a row without progress; the last: {what}")
        run.tracker.event(
            {"type": "restart", "cause": end.cause.value, "text": f"{what}; starting again from the last commit."}
        )


def _place(
    run: Run, config: GroupConfig, need: dict[str, float], sizes: list[int] | None, may_shrink: Callable[[], bool]
) -> Placed:
    """Room for all ranks, or for as many as may be."""

    def patience() -> float:
        return config.shrink_after if may_shrink() else config.start_timeout

    if placed := place(config.ranks, need, patience, run.id):
        return placed
    while may_shrink():
        interrupt.check()
        size = next_size(config.ranks, capacity(need, free_resources()), sizes)
        if size < max(1, config.min_ranks):
            break
        if placed := place(size, need, lambda: 10, name=run.id):
            text = f"There is room for {size} of {config.ranks} ranks; going on with {size}."
            run.tracker.event({"type": "warning", "text": text})
            return placed
    raise UserError(shortage(config.ranks, need, patience()))


class _Watch:
    """One start of a group, from its first event to its end."""

    def __init__(
        self, run: Run, group: RankGroup, config: GroupConfig, need: dict[str, float], sizes: list[int] | None
    ) -> None:
        self.run, self.group, self.config, self.need, self.sizes = run, group, config, need, sizes
        self.heartbeat = Heartbeat(config.retry.hang_seconds)
        self.committed = -1
        self.leaving: Cause | None = None  # why the ranks were asked to stop
        self.looked = time.monotonic()

    def until_end(self, entry: str) -> End:
        """Pass events on until all ranks returned, or one failed, or they hang."""
        rendezvous = self.group.serve()
        while not ray.wait([rendezvous], timeout=POLL_SECONDS)[0]:
            interrupt.check()
            if self._node_lost():
                return End(cause=Cause.node_lost)
        try:
            refs = waiting = self.group.start(entry, self.run.config, rendezvous)
        except ray.exceptions.RayError as error:  # rank 0 died, or memory ran out before it began
            return self._end(error)
        while True:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            self._pass_on_events()
            failed = [error for error in map(_error, done) if error]
            if failed:
                return self._end(*failed, *_errors_of(waiting), *self.group.deaths(failed))
            if not waiting:
                cause = self.leaving or (Cause.stopped if interrupt.requested() else None)
                return End(ray.get(refs[0]), cause, committed=self.committed)
            if self.heartbeat.overdue(time.monotonic()):
                return self._hung()
            if self._time_to_look():
                if self._node_lost():
                    return End(cause=Cause.node_lost, committed=self.committed)
                self._look()

    def _node_lost(self) -> bool:
        """Whether a node went away. Of a rank that had not begun there, Ray says nothing: it waits for room elsewhere,
        while the others wait for the rank."""
        return bool(lost_nodes(self.group.nodes))

    def _end(self, *errors: BaseException) -> End:
        cause, error = classify(errors, self._node_lost() or bool(silent_nodes(self.group.nodes)))
        if cause is Cause.stopped:  # a rank was waiting for data when it was asked to stop; its last commit stands
            cause = self.leaving or Cause.stopped
        return End(cause=cause, error=error, committed=self.committed)

    def _pass_on_events(self) -> None:
        events, alive = self.group.poll()
        for event in events:
            if event["type"] in ("commit", "resumed"):
                self.committed = max(self.committed, event["step"])
            self.run.tracker.event(event)
        for step in alive:
            self.heartbeat.beat(step, time.monotonic())

    def _hung(self) -> End:
        name = f"hangs/{self.group.attempt}.txt"
        self.run.store.write(name, self.group.stacks().encode())
        text = f"No rank has shown a sign of life since step {self.heartbeat.step}; their stacks are in {name}."
        self.run.tracker.event({"type": "warning", "text": text})
        return End(cause=Cause.hang, committed=self.committed)

    def _time_to_look(self) -> bool:
        now = time.monotonic()
        if now - self.looked < (0 if interrupt.requested() else LOOK_SECONDS):
            return False
        self.looked = now
        return True

    def _look(self) -> None:
        """Whether the group should stop, commit and leave."""
        if self.leaving is not None:
            return
        if interrupt.requested() or self.run.stop_wished():
            interrupt.request()
            self.leaving = Cause.stopped
        elif self.group.nodes & draining_nodes():
            self.leaving = Cause.drained
            text = "A node is to go away; the ranks finish their step, commit and move."
            self.run.tracker.event({"type": "warning", "text": text})
        elif self._could_grow():
            self.leaving = Cause.grown
        if self.leaving is not None:
            self.group.request_stop()

    def _could_grow(self) -> bool:
        ranks = len(self.group.actors)
        if ranks == self.config.ranks:
            return False
        room = ranks + capacity(self.need, free_resources())
        return next_size(self.config.ranks, room, self.sizes) > ranks


def _error(ref: ray.ObjectRef) -> BaseException | None:
    try:
        ray.get(ref)
    except Exception as error:
        return error
    return None


def _errors_of(waiting: list[ray.ObjectRef]) -> list[BaseException]:
    """A dead peer shows as a broken connection on the others: give the others a moment to say more."""
    deadline, found = time.monotonic() + 2, []
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        found += [error for error in map(_error, done) if error]
    return found
