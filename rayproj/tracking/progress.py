"""Progress of the stages of a driver, for a person: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0
SHOWN = {"loss": "loss {:.3f}", "images_per_second": "{:.0f} samples/s", "epsilon": "ε {:.2f}"}

_console = Console(stderr=True)
_bars: Progress | None = None
_lock = Lock()


@contextmanager
def display() -> Iterator[None]:
    """Show bars for the length of a block, where there is a terminal."""
    global _bars
    if not _console.is_terminal:
        yield
        return
    with Progress(
        TextColumn("[bold]{task.description:<20}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>5.0f}/{task.total:<5.0f}"),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
        console=_console,
    ) as _bars:
        try:
            yield
        finally:
            _bars.refresh()
    _bars = None


def say(text: str) -> None:
    """One line, above the bars."""
    with _lock:
        if _bars is not None:
            _bars.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


class StageProgress:
    """One stage's bar or lines."""

    def __init__(self, name: str) -> None:
        self.name, self.total = name, 0
        self._task: TaskID | None = None
        self._said = self._began = time.monotonic()
        self._first = 0

    def start(self, total: int, completed: int = 0) -> None:
        self.total, self._first, self._began = total, completed, time.monotonic()
        if _bars is not None and self._task is None:
            self._task = _bars.add_task(self.name, total=total, completed=completed, values="")

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        values = "  ".join(form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics)
        if _bars is not None and self._task is not None:
            _bars.update(self._task, completed=step, values=values)
        elif time.monotonic() - self._said >= LINE_EVERY_SECONDS:
            self._said = time.monotonic()
            pace = (self._said - self._began) / max(1, step - self._first)
            left = f"{pace * (self.total - step):.0f} s left" if self.total else ""
            say(f"{self.name}: {step}/{self.total}  {values}  {left}")
