"""The supervisor on a real Ray: ranks that work, die, fail, hang about and are told to stop."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import ray

from rayproj import config as configuration
from rayproj.errors import Interrupted, UserError
from rayproj.runtime import interrupt
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.policy import RetryConfig
from rayproj.runtime.supervisor import fit

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_group_works_together_in_the_drivers_folder(open_run) -> None:  # type: ignore[no-untyped-def]
    with open_run(2) as run:
        found = fit(run, "tests.support.entries:sum_of_ranks", run_cluster(run))
        assert found == {"sum": 3.0, "world_size": 2, "cwd": os.getcwd()}
        assert run.finish(found)["job"] == "test"
    with open_run(2) as again:
        assert again.result["sum"] == 3.0 and again.result["seconds"] > 0


def run_cluster(run):  # type: ignore[no-untyped-def]
    return configuration.from_dict(GroupConfig, run.config["cluster"])


def test_a_killed_rank_and_the_rest_equal_an_undisturbed_run_bit_for_bit(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """kill -9 of rank 1 in step 6, from outside; the group is rebuilt and goes on from the commit of step 4."""
    with open_run(2) as run:
        undisturbed = fit(run, "tests.support.entries:train_regression", run_cluster(run))
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    with open_run(2) as run:
        killer = threading.Thread(target=kill_a_rank_after, args=(tmp_path / "run", 4))
        killer.start()
        found = fit(run, "tests.support.entries:train_regression", run_cluster(run))
        killer.join()
    assert found["weights"] == undisturbed["weights"] and found["step"] == 10
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["type"] for e in events] == ["restart"] and "process died" in events[0]["text"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]


def kill_a_rank_after(run_dir: Path, step: int) -> None:
    """kill -9 of rank 1 once a step is committed."""
    commit = run_dir / "checkpoints" / f"step-{step:08d}" / "COMMIT.json"
    while not commit.exists():
        time.sleep(0.005)
    os.kill(int((run_dir / "pid-1").read_text()), 9)


def test_what_the_user_can_put_right_is_not_retried(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="a fish; give a number"), open_run(2) as run:
        fit(run, "tests.support.entries:user_error", run_cluster(run))
    assert len(list((tmp_path / "run").glob("called-1-*"))) == 1


def test_a_run_that_dies_again_and_again_is_given_up(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with (
        pytest.raises(RuntimeError, match="failed 2 times in a row without progress"),
        open_run(1, retry=RetryConfig(max_failures=1)) as run,
    ):
        fit(run, "tests.support.entries:always_dies", run_cluster(run))


def test_too_few_workers_are_explained(open_run) -> None:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=r"needs 50 ranks of 1 CPU each.*2 of 2 CPU free on 1 node.*lower cluster.ranks"),
        open_run(50, start_timeout=1.0) as run,
    ):
        fit(run, "tests.support.entries:sum_of_ranks", run_cluster(run))
    assert time.monotonic() - began < 20


def test_a_stop_request_reaches_the_ranks(open_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def stop() -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not all((tmp_path / "run" / f"running-{r}").exists() for r in (0, 1)):
            time.sleep(0.1)
        interrupt.request()

    try:
        threading.Thread(target=stop).start()
        with pytest.raises(Interrupted), open_run(2) as run:
            fit(run, "tests.support.entries:runs_until_stopped", run_cluster(run))
        assert (tmp_path / "run" / "stopped-0").exists() and (tmp_path / "run" / "stopped-1").exists()
        assert not (tmp_path / "run" / "result.json").exists()
    finally:
        interrupt._wish.clear()


def test_a_stop_request_reaches_a_rank_that_waits_for_data(open_run) -> None:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    try:
        threading.Timer(6.0, interrupt.request).start()
        with pytest.raises(Interrupted), open_run(1) as run:
            fit(run, "tests.support.entries:waits_for_data", run_cluster(run))
        assert time.monotonic() - began < 30
    finally:
        interrupt._wish.clear()


def test_nothing_is_left_behind() -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())
