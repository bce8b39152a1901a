"""The supervisor of a rank group: start, watch, and start again from the last commit."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from rayproj.errors import Interrupted, NonFiniteLoss, UserError
from rayproj.runtime import interrupt
from rayproj.runtime.group import GroupConfig, RankGroup
from rayproj.runtime.run import Run

POLL_SECONDS = 0.2


def fit(run: Run, entry: str, config: GroupConfig) -> dict[str, Any]:
    """Run `entry(config, world, link)` on a rank group to its end, through failures.

    Args:
        entry: "package.module:function", imported by the workers.

    Returns:
        What rank 0 returned.

    Raises:
        UserError, NonFiniteLoss: from a rank; retrying would give the same.
        Interrupted: a stop was asked for, and the ranks have committed.
        RuntimeError: more than `max_failures` failures in a row without a new commit.
    """
    failures, committed = 0, -1
    while True:
        interrupt.check()
        group = RankGroup(config)
        try:
            outcome, step = _watch(run, group, group.start(entry, run.config))
        finally:
            group.kill()
        if not isinstance(outcome, BaseException):
            interrupt.check()
            return outcome
        if isinstance(outcome, Interrupted):
            raise Interrupted  # a rank was waiting for data when it was asked to stop; its last commit stands
        if isinstance(outcome, (UserError, NonFiniteLoss)):
            raise outcome
        if "No space left on device" in str(outcome):
            raise UserError(f"There is no space left for {run.store.uri}; free some, and run the same command again.")
        failures = 0 if step > committed else failures
        failures, committed = failures + 1, max(committed, step)
        what = _one_line(outcome)
        if failures > config.max_failures:
            raise RuntimeError(
                f"{run.id} failed {failures} times in a row without progress; the last: {what}"
            ) from outcome
        run.tracker.event({"type": "restart", "cause": what, "text": f"{what}; starting again from the last commit."})


def _watch(run: Run, group: RankGroup, refs: list[ray.ObjectRef]) -> tuple[Any, int]:
    """Pass events on until all ranks returned or one failed; returns rank 0's result or the cause of the failure, and
    the last step that was committed meanwhile."""
    waiting, committed, stopping = list(refs), -1, False
    while True:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
        for event in group.poll():
            if event["type"] in ("commit", "resumed"):
                committed = max(committed, event["step"])
            run.tracker.event(event)
        failed = [error for error in map(_error, done) if error]
        if failed:
            return _cause(failed, waiting), committed
        if not waiting:
            return ray.get(refs[0]), committed
        if interrupt.requested() and not stopping:
            stopping = True
            group.request_stop()


def _error(ref: ray.ObjectRef) -> BaseException | None:
    try:
        ray.get(ref)
    except Exception as error:
        return error
    return None


def _cause(failed: list[BaseException], waiting: list[ray.ObjectRef]) -> BaseException:
    """A dead peer shows as a broken connection on the others, so give the others a moment and take what says most."""
    deadline = time.monotonic() + 2
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        failed = failed + [error for error in map(_error, done) if error]
    for kind in (UserError, NonFiniteLoss, Interrupted, RayActorError):
        for error in failed:
            if isinstance(error, kind):
                return kind(*error.args) if kind in (UserError, NonFiniteLoss) else error
    return failed[0]


def _one_line(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        return "A rank's process died"
    text = str(getattr(error, "cause", None) or error).strip().splitlines()
    return f"A rank failed with {type(getattr(error, 'cause', None) or error).__name__}: {text[-1] if text else ''}"
