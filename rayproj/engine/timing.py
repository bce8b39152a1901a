"""Where the time of a step goes: phases that may nest, each second counted once, for the innermost."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("compute", "data_wait", "communication", "optimizer", "checkpoint_stall")
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce_scatter_tensor",
    "reduce_scatter_fn",
    "all_to_all_single",
)
_current: list[StepTimer] = []  # the timer that the process's collectives are charged to


class StepTimer:
    """Time by phase since the last `read`; outside of any phase it is "compute".

    On a GPU the marks are events of its stream and are read only by `read`, so that nothing waits for them: the time is
    that of the device. Collectives that run beside the computation (ZeRO-3's prefetch) count as what they run beside.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._open = ["compute"]
        self._marks: list[tuple[str, Any]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._last = self._now()
        _current[:] = [self]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self) -> None:
        now = self._now()
        if self._on_gpu:
            self._marks.append((self._open[-1], (self._last, now)))
        else:
            self._seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge a block to a phase."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()
            for name, (begin, end) in self._marks:
                self._seconds[name] += begin.elapsed_time(end) / 1e3
            self._marks.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


def charge_collectives(backend: Any) -> None:
    """Have the methods of DeepSpeed's communication backend charge the timer in use; again is harmless."""
    for name in COLLECTIVES:
        method = getattr(backend, name, None)
        if method is not None and not hasattr(method, "is_charged"):
            setattr(backend, name, _charged(method))


def _charged(method: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _current:
            return method(*args, **kwargs)
        with _current[0].phase("communication"):
            return method(*args, **kwargs)

    call.is_charged = True  # type: ignore[attr-defined]
    return call
