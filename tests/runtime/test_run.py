"""Run dirs: resumed by the same config, refused to another."""

from pathlib import Path

import pytest

from rayproj.errors import UserError
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import from_json
from tests.runtime.conftest import Config


def config(tmp_path: Path, **changes) -> Config:  # type: ignore[no-untyped-def]
    values = Config(run=RunConfig(dir=str(tmp_path / "a" / "b")))
    for name, value in changes.items():
        setattr(values, name, value)
    return values


def test_a_run_is_opened_finished_and_found_again(tmp_path: Path) -> None:
    with Run.open("job", config(tmp_path)) as run:
        assert run.id == "a-b" and run.result is None
        run.finish({"x": 1})
    with Run.open("job", config(tmp_path)) as run:
        assert run.result is not None and run.result["x"] == 1 and run.result["job"] == "job"


def test_another_config_is_refused_with_the_differences(tmp_path: Path) -> None:
    with Run.open("job", config(tmp_path)):
        pass
    says = r"belongs to another config \(steps was 1, now 2\); set another run\.dir"
    with pytest.raises(UserError, match=says), Run.open("job", config(tmp_path, steps=2)):
        pass


def test_where_it_runs_may_change(tmp_path: Path) -> None:
    with Run.open("job", config(tmp_path)):
        pass
    with Run.open("job", config(tmp_path, cluster=GroupConfig(ranks=7))) as run:
        assert run.config["cluster"]["ranks"] == 7


def test_the_time_of_a_failed_attempt_counts(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.open("job", config(tmp_path)):
        _ = 1 / 0
    with Run.open("job", config(tmp_path)) as run:
        attempts = run.store.list("attempts")
        spent = from_json(run.store.read(attempts[0]))["seconds"]
        assert len(attempts) == 1 and run.finish({})["seconds"] >= spent
