"""Goodput: how much of a run's time went into steps that counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Goodput:
    """Adds up the seconds of a run's surviving steps, by its rows of metrics.

    The rest of a run's time is start-up, waiting for the cluster, and steps that were lost with a rank and made again.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._useful, self._step, self._timed = 0.0, 0, False
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Take a row: "step" and, of each step since the row before, "step_seconds" if there were steps."""
        if "step_seconds" in row:
            self._useful += row["step_seconds"] * (row["step"] - self._step)
            self._timed = True
        self._step = row["step"]

    def share(self, worked: float) -> dict[str, float]:
        """{"goodput": in [0, 1]} of the seconds that drivers worked on the run; {} where no row had a time."""
        return {"goodput": min(1.0, self._useful / max(worked, 1e-9))} if self._timed else {}
