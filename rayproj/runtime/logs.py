"""What a run has said: warnings, restarts, how its attempts ended, and the tracebacks that it kept."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from rayproj.runtime.run import attempts, job_of
from rayproj.storage.store import Store
from rayproj.tracking.tracker import rows_of

POLL_SECONDS = 1.0


def lines(run: Store) -> list[str]:
    """One line for each thing that happened, oldest first; its time is this machine's."""
    said: list[tuple[float, str]] = []
    for attempt in attempts(run):
        said.append((attempt.began, f"begun on {attempt.host} as process {attempt.pid}"))
        if attempt.ended:
            said.append((attempt.ended, f"{attempt.outcome}{': ' if attempt.why else ''}{attempt.why}"))
    said += [(event["time"], event["text"]) for event in rows_of(run, "events.jsonl")]
    said += [(row["time"], _metrics(row)) for row in rows_of(run, "metrics.jsonl")]
    return [f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M:%S}  {text}" for when, text in sorted(said)]


def _metrics(row: dict[str, Any]) -> str:
    shown = ("loss", "epsilon", "images_per_second", "goodput")
    return f"step {row['step']}" + "".join(f"  {name} {row[name]:.4g}" for name in shown if name in row)


def print_logs(run_dir: str, follow: bool) -> int:
    """Print what a run has said; with `follow`, go on until it ends, and return 1 if it failed.

    Raises:
        UserError: there is no run.
    """
    job_of(run_dir)
    run = Store(run_dir)
    shown: set[str] = set()
    while True:
        for line in lines(run):
            if line not in shown:
                print(line, flush=True)
                shown.add(line)
        ended = [a.outcome for a in attempts(run)[-1:] if a.outcome]
        if ended or not follow:
            if run.exists("log.txt"):
                print(run.read("log.txt").decode(), end="", flush=True)
            return int(follow and ended == ["failed"])
        time.sleep(POLL_SECONDS)
