"""What the runs below a folder are at, from what they wrote."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from rayproj.errors import UserError
from rayproj.runtime.run import attempts
from rayproj.storage.store import Store
from rayproj.tracking.tracker import rows_of

SILENT_SECONDS = 900.0


def runs(root: str) -> list[dict[str, Any]]:
    """One row for each run: name, state, step, last commit, loss, ε and the age of the last sign of life in seconds.

    The state is done; stopped or failed, with the reason of the latter; running; or silent, where a driver took the run
    up and has neither left it nor shown a sign of life for a quarter of an hour.

    Raises:
        UserError: there is no run.
    """
    store = Store(root)
    files = store.list()
    folders = sorted(path.removesuffix("config.yaml").rstrip("/") for path in files if path.endswith("config.yaml"))
    if not folders:
        raise UserError(f"There is no run below '{root}'; start one with 'rayproj demo', or give another folder.")
    return [_row(store, folder, [f for f in files if f.startswith(folder)]) for folder in folders]


def _row(store: Store, folder: str, files: list[str]) -> dict[str, Any]:
    run = store.at(folder.rstrip("/")) if folder else store
    rows = rows_of(run, "metrics.jsonl")
    result = run.parsed("result.json") if run.exists("result.json") else None
    steps = [int(f.split("step-")[1][:8]) for f in files if f.endswith("/COMMIT.json")]
    last = rows[-1] if rows else {}
    latest = attempts(run)[-1:]
    times = [last.get("time"), result and result["finished_at"], *(a.ended or a.began for a in latest)]
    when = max((t for t in times if t), default=None)
    age = time.time() - when if when else None
    state = "done" if result else "new"
    if latest and not result:
        state = latest[0].outcome or ("running" if age is not None and age < SILENT_SECONDS else "silent")
    return {
        "run": folder or store.uri,
        "state": state,
        "why": "" if result or not latest else latest[0].why,
        "step": last.get("step"),
        "commit": max(steps, default=None),
        "loss": last.get("loss"),
        "epsilon": last.get("epsilon"),
        "age": age,
    }


def print_status(root: str) -> int:
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "last commit", "loss", "ε", "last sign"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    rows = runs(root)
    for row in rows:
        forms = ("{:d}", "{:d}", "{:.4f}", "{:.3f}", "{:.0f} s ago")
        cells = [row[key] for key in ("step", "commit", "loss", "epsilon", "age")]
        shown = ["–" if cell is None else form.format(cell) for form, cell in zip(forms, cells, strict=True)]
        table.add_row(row["run"], row["state"], *shown)
    Console().print(table)
    for row in rows:
        if row["why"]:
            print(f"{row['run']}: {row['why']}")
    return 0
