"""Many runs of one template: a grid of overrides over the config of a job or chain, each point a run dir of its own.

A point that is done is not run again, so the sweep can be killed anywhere and goes on when it is started again; what a point
does when it goes on, its jobs say. Points are Ray tasks: as many run at once as the cluster has room for, a worker process
that is through with one takes the next, and a point whose node is lost is run on another.

Ray Tune would do less of this: its trials are known to its own experiment state, which is written now and then, so that what
ended since the last time is run again, or is lost; and it would not see that a run dir is done already.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import Any

import ray

from rayproj import chain
from rayproj import config as configuration
from rayproj.errors import Interrupted, UserError
from rayproj.runtime import interrupt
from rayproj.runtime.run import Run, require_same, wish_stop
from rayproj.storage.store import Store, from_json, to_json

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0  # that points have to commit
Axes = dict[str, Any]
"""Name -> {name of a value: its overrides, such as [train.steps=100]}; or a key of the config -> a list of its values."""


@dataclass
class GridConfig:
    """All combinations of the values of some axes, over one template."""

    template: str = "???"  # a YAML file: a chain, whose paths are below its ${root}, or the config of `job`
    job: str = ""  # the job of the template, such as train_classifier; "": a chain
    set: list[str] = field(default_factory=list)  # overrides of the template for all its points
    axes: Axes = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = []
        for name, values in self.axes.items():
            named = isinstance(values, dict) and all(isinstance(v, list) for v in values.values())
            if not values or not (named or isinstance(values, list)):
                found.append(f"sweep.grids: the axis '{name}' is a list of values, or {{name: [key=value, ...], ...}}.")
        return found


@dataclass
class SweepConfig:
    """Which points, and where they are kept."""

    out: str = "???"  # a point's run dir is <out>/<point>; of a chain it is the root
    set: list[str] = field(default_factory=list)  # overrides of the templates for all points
    grids: dict[str, GridConfig] = field(default_factory=dict)  # points that several have are run once

    def problems(self) -> list[str]:
        return [] if self.grids else ["sweep.grids must have at least one grid."]


@dataclass
class RoomConfig:
    """What each point reserves."""

    cpus: float = 1.0  # 0: its jobs reserve their own, as those with ranks or makers do
    gpus: float = 0.0
    at_once: int = 0  # points at most; 0: as many as there is room for

    def problems(self) -> list[str]:
        endless = self.cpus <= 0 and self.gpus <= 0 and not self.at_once
        found = ["room.at_once must be given where a point reserves nothing."] if endless else []
        return found + configuration.below(0, "room", self, "cpus", "gpus", "at_once")


@dataclass(frozen=True)
class Point:
    """One run of the sweep.

    Attributes:
        grids: the grids that it is in.
        axes: name -> name of its value.
        stages: as of a chain: (stage, job, config as a dict), those of one list at the same time.
    """

    name: str
    grids: tuple[str, ...]
    axes: dict[str, str]
    stages: list[list[tuple[str, str, dict[str, Any]]]]

    def runs(self) -> dict[str, str]:
        """The run dir of each stage, by its name."""
        return {name: config["run"]["dir"] for together in self.stages for name, _, config in together}

    def results(self) -> dict[str, dict[str, Any]] | None:
        """What each stage found, by its name; None if the point is not done."""
        found = {}
        for name, folder in self.runs().items():
            store = Store(folder)
            if not store.exists("result.json"):
                return None
            found[name] = from_json(store.read("result.json"))
        return found


def points(config: SweepConfig) -> list[Point]:
    """The points of all grids, in their order.

    Raises:
        UserError: a template or an override is wrong, or two grids mean different things by one name.
    """
    found: dict[str, Point] = {}
    for grid, one in config.grids.items():
        for axes, overrides in _combinations(one.axes):
            name = ",".join(f"{axis}={value}" for axis, value in axes.items()) or grid
            if set(name) & set("/\\ ") or name.startswith("."):
                raise UserError(f"sweep.grids.{grid}: '{name}' names a folder; use no blanks and slashes in names.")
            stages = _stages(one, f"{config.out}/{name}", [*config.set, *one.set, *overrides])
            there = found.get(name)
            if there and there.stages != stages:
                raise UserError(
                    f"sweep.grids: '{name}' of '{grid}' is another point in '{there.grids[0]}'; name the axes differently."
                )
            found[name] = Point(name, (*(there.grids if there else ()), grid), axes, stages)
    return list(found.values())


def _combinations(axes: Axes) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The values of each point by axis, and its overrides."""
    choices = []
    for key, values in axes.items():
        if isinstance(values, dict):
            choices.append([(key, str(name), list(map(str, overrides))) for name, overrides in values.items()])
        else:
            choices.append([(key.rpartition(".")[2], str(value), [f"{key}={value}"]) for value in values])
    for chosen in product(*choices):
        yield {axis: value for axis, value, _ in chosen}, [word for *_, words in chosen for word in words]


def _stages(grid: GridConfig, folder: str, overrides: list[str]) -> list[list[tuple[str, str, dict[str, Any]]]]:
    if grid.job:
        if grid.job not in chain.jobs():
            raise UserError(f"sweep: there is no job '{grid.job}'; give one of {', '.join(chain.jobs())}.")
        config = configuration.load(_job(grid.job).Config, grid.template, [*overrides, f"run.dir={folder}"])
        return [[(grid.job, grid.job, configuration.to_dict(config))]]
    whole = chain.load(grid.template, [*overrides, f"root={folder}"])
    return [
        [(name, job, configuration.to_dict(getattr(whole, name))) for name, job in together.items()]
        for together in whole.stages
    ]


def sweep(config: SweepConfig, room: RoomConfig, run: Run) -> dict[str, Any]:
    """Run the points that are not done, and gather what all of them found in table.json and table.parquet.

    Raises:
        Interrupted: a stop was asked for; the points have committed.
        UserError: a point was begun with another config.
        RuntimeError: points failed; all others are done, and these are tried again by the next start.
    """
    every = points(config)
    for _, job, values in (stage for point in every for together in point.stages for stage in together):
        if (there := Store(values["run"]["dir"])).exists("config.yaml"):
            require_same(there, configuration.from_dict(_job(job).Config, values))
    run.tracker.event({"type": "total", "steps": len(every)})
    run.store.delete_tree("failed")
    failed = _run(every, room, run)
    rows = [
        {"point": p.name, "grids": list(p.grids), "axes": p.axes, "runs": p.runs(), "results": p.results()}
        for p in every
    ]
    rows = [row for row in rows if row["results"] is not None]
    run.store.write("table.json", to_json(rows))
    if rows:
        run.store.write("table.parquet", _parquet(rows))
    if failed:
        names = ", ".join(list(failed)[:5]) + (", ..." if len(failed) > 5 else "")
        raise RuntimeError(
            f"{len(failed)} of {len(every)} points failed ({names}); {run.store.uri}/failed says how. The others are done, "
            "and the same command tries these again."
        )
    return {"points": len(every), "table": f"{run.store.uri}/table.json"}


def _run(every: list[Point], room: RoomConfig, run: Run) -> dict[str, str]:
    """Run all points; returns those that failed, and why."""
    work = ray.remote(num_cpus=room.cpus, num_gpus=room.gpus)(_work)
    waiting, busy, failed = [p for p in every if p.results() is None], dict[Any, Point](), dict[str, str]()
    done = len(every) - len(waiting)
    try:
        while waiting or busy:
            interrupt.check()
            if run.stop_wished():
                raise Interrupted
            while waiting and (not room.at_once or len(busy) < room.at_once):
                point = waiting.pop(0)
                busy[work.options(name=f"{run.id} {point.name}").remote(point.stages, os.getcwd())] = point
            for ref in ray.wait(list(busy), timeout=POLL_SECONDS)[0]:
                point = busy.pop(ref)
                try:
                    ray.get(ref)
                    done += 1
                    run.tracker.event({"type": "metrics", "step": done})
                except Exception as error:
                    failed[point.name] = _why(error)
                    run.store.write(f"failed/{point.name}.txt", str(error).encode())
                    run.tracker.event({"type": "warning", "text": f"{point.name} failed: {failed[point.name]}"})
    finally:
        _stop(busy)
    return failed


def _stop(busy: dict[Any, Point]) -> None:
    """Have the points that run commit and leave, if they do so in time; one that is between two stages is asked again."""
    deadline, waiting = time.monotonic() + STOP_SECONDS, list(busy)
    for ref in waiting:
        ray.cancel(ref)  # those that wait for room; one that runs looks up only when its jobs leave
    while waiting and time.monotonic() < deadline:
        for folder in (folder for ref in waiting for folder in busy[ref].runs().values()):
            with suppress(UserError):  # it has not begun, or is done
                wish_stop(folder)
        waiting = ray.wait(waiting, num_returns=len(waiting), timeout=2 * POLL_SECONDS)[1]


def _why(error: Exception) -> str:
    original = getattr(error, "cause", None) or error
    return f"{type(original).__name__}: {str(original).strip().splitlines()[-1] if str(original).strip() else ''}"


def _work(stages: list[list[tuple[str, str, dict[str, Any]]]], folder: str) -> None:
    """One point, in a worker of Ray's."""
    os.chdir(folder)  # relative paths mean the driver's folder
    interrupt.forget()
    chain.run(
        [[(_job(job).main, configuration.from_dict(_job(job).Config, v)) for _, job, v in part] for part in stages]
    )


def _job(name: str) -> ModuleType:
    return import_module(f"rayproj.jobs.{name}")


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    """A row for each point: its name, its axes, and every number that its stages found, as <stage>.<key>.<key>."""
    import pyarrow as pa
    from pyarrow import parquet

    flat = [{"point": row["point"], **row["axes"], **dict(_numbers(row["results"]))} for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    sink = io.BytesIO()
    parquet.write_table(pa.table({name: [row.get(name) for row in flat] for name in names}), sink)
    return sink.getvalue()


def _numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield prefix, float(value)
