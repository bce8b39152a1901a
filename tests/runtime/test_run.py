"""Run dirs: resumed by the same config, refused to another."""

import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rayproj.data.importing import ImportConfig
from rayproj.data.parts import KeepConfig
from rayproj.errors import UserError
from rayproj.runtime import run as run_module
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.logs import print_logs
from rayproj.runtime.run import Attempt, Run, RunConfig, attempts, seconds, wish_stop
from rayproj.storage.store import Store, to_json
from rayproj.tracking.tracker import TrackingConfig, WandbMode
from tests.support.entries import RunOnly


@dataclass
class ImportOnly:
    pair: tuple[float, float] = (0.9, 0.99)  # which a file has as a list
    data: ImportConfig = field(default_factory=ImportConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(wandb=WandbMode.disabled))


def config(tmp_path: Path, **changes) -> RunOnly:  # type: ignore[no-untyped-def]
    values = RunOnly(run=RunConfig(dir=str(tmp_path / "a" / "b")))
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


def test_what_an_older_version_did_not_have_is_as_by_default(tmp_path: Path) -> None:
    with Run.open("job", config(tmp_path)):
        pass
    path = tmp_path / "a" / "b" / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("steps")))
    with Run.open("job", config(tmp_path)):
        pass
    with pytest.raises(UserError, match=r"\(steps was 1, now 2\)"), Run.open("job", config(tmp_path, steps=2)):
        pass


def test_nor_do_the_items_of_its_lists_lack_anything(tmp_path: Path) -> None:
    given = ImportOnly(
        data=ImportConfig(out="x", keep=[KeepConfig("a", count=3)]), run=RunConfig(dir=str(tmp_path / "b"))
    )
    with Run.open("job", given):
        pass
    path = tmp_path / "b" / "config.yaml"
    lines = path.read_text().splitlines(True)
    assert any("after: 0" in line for line in lines)
    path.write_text("".join(line for line in lines if "after: 0" not in line))
    with Run.open("job", given):
        pass
    given.data.keep[0].count = 4
    with pytest.raises(UserError, match=r"data\.keep was"), Run.open("job", given):
        pass


def test_where_it_runs_may_change(tmp_path: Path) -> None:
    with Run.open("job", config(tmp_path)):
        pass
    with Run.open("job", config(tmp_path, cluster=GroupConfig(ranks=7))) as run:
        assert run.config["cluster"]["ranks"] == 7


def test_the_time_of_a_failed_attempt_counts_and_its_reason_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.open("job", config(tmp_path)):
        time.sleep(0.2)
        _ = 1 / 0
    with Run.open("job", config(tmp_path)) as run:
        failed, now = attempts(run.store)
        assert failed.outcome == "failed" and failed.why == "ZeroDivisionError: division by zero"
        assert now.ended is None and run.finish({})["seconds"] >= 0.2
    assert [a.outcome for a in attempts(run.store)] == ["failed", "done"]


def test_of_a_killed_driver_the_time_to_its_last_sign_counts() -> None:
    times = {"host": "h", "pid": 1, "why": ""}
    done = [
        Attempt(began=10, ended=15, outcome="failed", **times),
        Attempt(began=20, ended=None, outcome=None, **times),
    ]
    assert seconds(done, signs=[12.0, 23.0, 27.5]) == 5 + 7.5
    assert seconds(done, signs=[]) == 5
    assert seconds([done[1], Attempt(began=30, ended=31, outcome="done", **times)], signs=[22.0, 30.5]) == 2 + 1


def test_a_driver_that_was_killed_is_a_restart_and_one_that_lives_is_in_the_way(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a" / "b"))
    with Run.open("job", config(tmp_path)):
        pass
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        start = {"began": time.time() + 1, "host": socket.gethostname(), "pid": other.pid}
        store.put_once(f"attempts/{start['began']:.3f}/start.json", to_json(start))
        with pytest.raises(UserError, match=f"process {other.pid} works on"), Run.open("job", config(tmp_path)):
            pass
    finally:
        other.kill()
        other.wait()
    with Run.open("job", config(tmp_path)) as run:
        assert run.finish({})["restarts"] == {"driver lost": 1}


def test_another_job_is_refused(tmp_path: Path) -> None:
    with Run.open("job", config(tmp_path)):
        pass
    with pytest.raises(UserError, match="belongs to the job job, not other"), Run.open("other", config(tmp_path)):
        pass


def test_one_mistake_in_the_number_of_ranks_is_one_problem() -> None:
    assert GroupConfig(ranks=-1).problems() == ["cluster.ranks must be at least 0, not -1."]
    assert GroupConfig(ranks=2, min_ranks=3).problems() == ["cluster.min_ranks must not exceed cluster.ranks."]
    assert GroupConfig(ranks=2, min_ranks=2).problems() == []


@pytest.mark.parametrize("content", ["", '{"job": "jo', "{}", "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    with Run.open("job", config(tmp_path)):
        pass
    place = tmp_path / "a" / "b"
    (place / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run.json' is damaged and cannot be read .*; put it back from a copy"):
        wish_stop(str(place))
    with pytest.raises(UserError, match=r"run.json' is damaged"):
        print_logs(str(place), follow=False)
    with pytest.raises(UserError, match=r"run.json' is damaged"), Run.open("job", config(tmp_path)):
        pass
    (place / "run.json").write_text('{"job": "job"}')
    next(place.glob("attempts/*/start.json")).write_text(content)
    with pytest.raises(UserError, match=r"start.json' is damaged"):
        print_logs(str(place), follow=False)


def test_a_wish_to_stop_reaches_the_driver_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOOK_SECONDS", 0)
    place = str(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="There is no run"):
        wish_stop(place)
    with Run.open("job", config(tmp_path)) as run:
        assert not run.stop_wished()
        assert f"rayproj resume {place}" in wish_stop(place)
        assert run.stop_wished()
    with pytest.raises(UserError, match="it stopped already"):
        wish_stop(place)
    with Run.open("job", config(tmp_path)) as run:
        assert not run.stop_wished()
        run.finish({})
    with pytest.raises(UserError, match="is done"):
        wish_stop(place)
