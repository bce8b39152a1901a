"""A chain of jobs under one config, on an embedded or given Ray: `rayproj chain CONFIG`; `rayproj demo` is one of them.

Its file names the stages and has a section for each, which is the config of an ordinary job:

    root: runs/mine
    stages:                                 # in order; those of one line run at the same time
    - {import_data: import_data}            # name of the stage: name of the job
    - {generate_public: generate, classifier_public: train_classifier}
    import_data: {data: {out: "${root}/data"}, run: {dir: "${root}/import_data"}}
    ...
"""

from __future__ import annotations

import dataclasses
import keyword
import pkgutil
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from rayproj import config as configuration
from rayproj.errors import UserError
from rayproj.runtime import interrupt


@dataclass
class Config:
    """What every chain has; `load` adds a field for each stage."""

    root: str = "runs/chain"  # for the stages' own paths, as ${root}
    stages: list[dict[str, str]] = field(default_factory=list)


Stage = tuple[Callable[[Any], dict[str, Any]], Any]
# They put another module in their place when they are imported; of two threads that import one at once, the second gets the
# module without the names.
REPLACED = ("transformers", "diffusers")


def jobs() -> list[str]:
    """The names of all jobs that have a config."""
    folder = import_module("rayproj.jobs").__path__
    return sorted(m.name for m in pkgutil.iter_modules(folder) if m.name != "benchmark")


def load(path: str | Path, overrides: list[str]) -> Config:
    """The config of a chain, with dotted overrides such as `train_diffusion.train.steps=100`.

    Raises:
        UserError: the file names no stages, one of no job, or a stage's section is not a config of its job.
    """
    stages: Any = configuration.read(path).get("stages")
    if any(word.partition("=")[0].partition(".")[0] == "stages" for word in overrides):
        raise UserError("The stages of a chain stand in its file alone; copy the file and change them there.")
    if not isinstance(stages, ListConfig) or not stages or not all(map(_are_stages, stages)):
        raise UserError(f"'{path}' is no chain; it needs 'stages:' with lines like '- {{NAME: JOB}}'.")
    known, fields, taken = jobs(), [], [one.name for one in dataclasses.fields(Config)]
    for name, job in [pair for together in stages for pair in together.items()]:
        if not str(name).isidentifier() or keyword.iskeyword(name) or name in taken:
            raise UserError(f"The stage '{name}' of '{path}' must have another name: letters, digits and _, used once.")
        taken.append(name)
        if job not in known:
            raise UserError(f"The stage '{name}' of '{path}' is of no job '{job}'; give one of {', '.join(known)}.")
        schema = import_module(f"rayproj.jobs.{job}").Config
        fields.append((name, schema, field(default_factory=schema)))
    return configuration.load(dataclasses.make_dataclass("Chain", fields, bases=(Config,)), path, overrides)


def _are_stages(together: Any) -> bool:
    """Whether that is one entry of 'stages:'."""
    return isinstance(together, DictConfig) and bool(together) and all(isinstance(j, str) for j in together.values())


def stages_of(config: Config) -> list[list[Stage]]:
    """The stages in order; those of one entry run at the same time."""
    return [
        [(import_module(f"rayproj.jobs.{job}").main, getattr(config, name)) for name, job in together.items()]
        for together in config.stages
    ]


def main(config: Config) -> dict[str, Any]:
    """Run what is not done yet; returns the last stage's result."""
    return run(stages_of(config))


def run(stages: list[list[Stage]]) -> dict[str, Any]:
    """As `main`, of stages that are there."""
    result: dict[str, Any] = {}
    for together in stages:
        if len(together) > 1:
            for library in REPLACED:
                import_module(library)
        with ThreadPoolExecutor(len(together)) as pool:
            running = [pool.submit(job, stage) for job, stage in together]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            failed = [future.exception() for future in done if future.exception()]
            if failed:
                interrupt.request()  # what waits for the failed stage would wait for ever
                raise failed[0]  # type: ignore[misc]
            result = running[-1].result()
    return result
