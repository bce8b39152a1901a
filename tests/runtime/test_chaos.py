"""What kills and cuts do to runs on a cluster of several nodes: each node a raylet of its own, each driver a process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.engine.checkpoint import commits
from rayproj.storage.store import Store
from tests.support import images, regression
from tests.support.commands import ROOT, environment
from tests.support.ranks import run_ranks
from tests.support.s3 import s3_server

STEPS = 16  # a commit every 4
RAY = str(Path(sys.executable).parent / "ray")


class Chaos:
    """A cluster whose head has no CPU, and drivers on it."""

    def __init__(self, folder: str, **extra: str) -> None:
        self.pids = Path(folder, "pids")
        self.pids.mkdir()
        self.env = environment(PYTHONPATH=str(ROOT), RAYPROJ_TEST_PIDS=str(self.pids))
        # A lost node is known after 4 s, not after 12 to 30.
        quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}
        self.env |= quick | {"RAY_health_check_failure_threshold": "4", "RAY_health_check_initial_delay_ms": "0"}
        self.env |= extra
        Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # Cluster notes its address there
        with self.environ():
            head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
            self.cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": folder})
        self.env["RAY_ADDRESS"] = self.cluster.address
        self.nodes: list[Any] = []
        self.drivers: list[subprocess.Popen[str]] = []

    def environ(self, **extra: str) -> Any:
        patch = pytest.MonkeyPatch()
        for name, value in (self.env | extra).items():
            if name.startswith(("RAY", "PYTHONPATH")):
                patch.setenv(name, value)
        return _undoing(patch)

    def add(self, **extra: str) -> Any:
        """A node with room for one rank."""
        with self.environ(**extra):
            node = self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        self.nodes.append(node)
        return node

    def remove(self, node: Any) -> None:
        """As a power cut: the raylet and all its workers die."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def start(self, entry: str, uri: str, *overrides: str, **extra: str) -> subprocess.Popen[str]:
        words = [f"tests.support.entries:{entry}", f"run.dir={uri}", "cluster.ranks=2", f"steps={STEPS}", *overrides]
        command = [sys.executable, "-m", "tests.support.drive", *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.env | extra, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.drivers.append(process)
        return process

    def end(self) -> None:
        """Between tests: no driver and no node is left."""
        for process in self.drivers:
            process.kill()
            process.wait()
        for node in list(self.nodes):
            self.remove(node)
        self.drivers.clear()


class _undoing:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@contextmanager
def cluster(**extra: str) -> Iterator[Chaos]:
    folder = tempfile.mkdtemp(prefix="rp", dir="/tmp")  # Ray's sockets need a short path
    found = Chaos(folder, **extra)
    try:
        yield found
    finally:
        found.cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def chaotic() -> Iterator[Chaos]:
    with cluster() as found:
        yield found


@pytest.fixture
def chaos(chaotic: Chaos) -> Iterator[Chaos]:
    yield chaotic
    chaotic.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The weights after all steps on two ranks, without Ray."""
    found = run_ranks(regression.run, 2, str(tmp_path_factory.mktemp("run")), regression.config(STEPS), "only")
    return {name: tensor.numpy() for name, tensor in found[0]["weights"].items()}


def assert_equal(store: Store, expected: dict[str, np.ndarray], rounding: float = 0.0) -> None:
    found = json.loads(store.read("result.json"))
    assert found["step"] == STEPS
    for name, value in expected.items():
        np.testing.assert_allclose(np.float32(found["weights"][name]), value, rtol=0, atol=rounding)


def until(happened: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        if time.monotonic() >= deadline:
            process.kill()
            raise AssertionError(f"too late; the driver said: {process.stderr and process.stderr.read()}")
        time.sleep(0.02)
    return found


def until_committed(store: Store, process: subprocess.Popen[str], step: int = 4) -> None:
    until(lambda: any(commit.step >= step for commit in commits(store)), process)


def ended(process: subprocess.Popen[str], seconds: float = 240) -> str:
    """What a driver said that ended well."""
    _, stderr = process.communicate(timeout=seconds)
    assert process.returncode == 0, stderr
    return stderr


def events(store: Store, kind: str = "restart") -> list[dict[str, Any]]:
    text = store.read("events.jsonl") if store.exists("events.jsonl") else b""
    return [row for row in map(json.loads, text.splitlines()) if row["type"] == kind]


def causes(store: Store) -> list[str]:
    return [row["cause"] for row in events(store)]


def test_a_lost_node_shrinks_the_group_and_a_new_one_lets_it_grow_back(chaos: Chaos, tmp_path: Path) -> None:
    # Dropout draws by rank, so that it is not the same on another number of ranks.
    settings, task = regression.config(STEPS), regression.Regression(dropout=0.0)
    undisturbed = run_ranks(regression.run, 2, str(tmp_path / "undisturbed"), settings, "only", task)
    store = Store(str(tmp_path / "run"))
    chaos.add(), (victim := chaos.add())
    process = chaos.start("train_slowly", store.uri, "pause=0.7", "dropout=false", "cluster.shrink_after=2")
    until_committed(store, process)
    chaos.remove(victim)
    until(lambda: any("with 1" in row["text"] for row in events(store, "warning")), process)
    chaos.add()
    said = ended(process)
    assert causes(store) == ["node lost", "grown"], said
    assert "A node was lost; starting again from the last commit" in said
    assert json.loads(store.read("result.json"))["ranks"] == 2
    expected = {name: tensor.numpy() for name, tensor in undisturbed[0]["weights"].items()}
    assert_equal(store, expected, rounding=1e-5)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(0, id="before Ray knows"), pytest.param(8, id="after Ray knows", marks=pytest.mark.slow)],
)
def test_a_node_lost_between_placement_and_start_is_not_waited_for(  # type: ignore[no-untyped-def]
    chaos: Chaos, tmp_path: Path, undisturbed, seconds: float
) -> None:
    store, held = Store(str(tmp_path / "run")), tmp_path / "held"
    chaos.add(), (victim := chaos.add())
    process = chaos.start("train_slowly", store.uri, RAYPROJ_TEST_HOLD=str(held))
    until(held.exists, process)
    chaos.remove(victim)
    time.sleep(seconds)
    held.unlink()
    until(lambda: causes(store), process)
    chaos.add()
    said = ended(process)
    assert causes(store) == ["node lost"], said
    assert_equal(store, undisturbed)


def test_a_drained_node_is_left_after_a_commit(chaos: Chaos, tmp_path: Path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path / "run"))
    chaos.add(), (leaving := chaos.add())
    process = chaos.start("train_slowly", store.uri, "pause=1", "every_steps=1000")
    until(lambda: store.exists("metrics.jsonl"), process)
    chaos.add()
    notice = [RAY, "drain-node", "--address", chaos.cluster.address, "--node-id", leaving.node_id]
    notice += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    notice += ["--deadline-remaining-seconds=600"]
    told = subprocess.run(notice, env=chaos.env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    said = ended(process)
    assert causes(store) == ["drained"]
    # It left after whichever step it was at, having committed that: nothing else had been.
    assert "the ranks finish their step, commit and move" in said and re.search(r"going on from step [1-9]", said)
    assert_equal(store, undisturbed)


def test_a_stopped_process_is_a_hang_whose_stacks_are_kept(chaos: Chaos, tmp_path: Path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path / "run"))
    chaos.add(), chaos.add()
    process = chaos.start("train_slowly", store.uri, "pause=0.2", "cluster.retry.hang_seconds=6")
    until_committed(store, process)
    os.kill(int((chaos.pids / "run" / "1").read_text()), signal.SIGSTOP)
    said = ended(process)
    assert causes(store) == ["hang"] and "The ranks hung" in said
    (name,) = store.list("hangs")
    stacks = store.read(name).decode()
    assert "rank 1\ndoes not answer" in stacks and "MainThread" in stacks
    assert_equal(store, undisturbed)


@pytest.mark.parametrize("room", [pytest.param(2 << 30, id="as it trains"), pytest.param(0, id="before it begins")])
def test_memory_that_runs_out_is_called_so(chaos: Chaos, tmp_path: Path, room: int) -> None:
    import psutil

    store = Store(str(tmp_path / "run"))
    for _ in range(2):
        memory = psutil.virtual_memory()
        share = (memory.total - memory.available + room) / memory.total if room else 0.001
        chaos.add(RAY_memory_usage_threshold=f"{share:.3f}", RAY_memory_monitor_refresh_ms="100")
    process = chaos.start("eats_memory", store.uri, "cluster.retry.max_failures=0")
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1 and "A rank ran out of memory (a smaller train.micro_batch needs less)" in stderr


def test_an_infinite_loss_is_not_tried_again(chaos: Chaos, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    chaos.add(), chaos.add()
    process = chaos.start("train_to_infinity", store.uri)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1 and "At step 7 the metrics were {'loss': inf}; lower the learning rate" in stderr
    assert causes(store) == [] and [c.step for c in commits(store)] == [4]


def test_samplers_come_and_go_with_the_nodes(chaos: Chaos, tmp_path: Path) -> None:
    """A pool of two has room for one, then for both, then for one again: every shard is there once."""
    first, samples = chaos.add(), 160
    command = [sys.executable, "-m", "tests.support.produce", str(tmp_path), str(samples), "0.3"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=chaos.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    chaos.drivers.append(process)
    until((tmp_path / "data" / "dataset.json").exists, process)
    dataset = Dataset.open(str(tmp_path / "data"))
    until(lambda: len(dataset.records()) >= 3, process)
    assert len({record.made_by for record in dataset.records().values()}) == 1
    chaos.add()
    until(lambda: len({record.made_by for record in dataset.records().values()}) == 2, process)
    chaos.remove(first)
    ended(process)
    assert dataset.complete
    notes = Reader(dataset, ["note"]).gather(np.arange(samples))["note"]
    assert list(notes) == [images.sample(i)["note"] for i in range(samples)]


def test_a_killed_driver_is_followed_by_another(chaos: Chaos, tmp_path: Path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path / "run"))
    chaos.add(), chaos.add()
    process = chaos.start("train_slowly", store.uri, "pause=0.3")
    until_committed(store, process)
    process.kill()
    ended(chaos.start("train_slowly", store.uri, "pause=0.3"))
    assert causes(store) == ["driver lost"]
    assert_equal(store, undisturbed)


def test_a_lost_head_is_said_and_the_last_commit_is_good(tmp_path: Path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path / "run"))
    with cluster(RAY_gcs_rpc_server_reconnect_timeout_s="8") as chaos:
        chaos.add(), chaos.add()
        process = chaos.start("train_slowly", store.uri, "pause=0.3")
        until_committed(store, process)
        chaos.cluster.head_node.all_processes["gcs_server"][0].process.kill()
        _, stderr = process.communicate(timeout=60)
        chaos.end()
    assert process.returncode == 1
    assert "does not answer" in stderr and "run the same command: the run goes on from its last commit" in stderr
    assert not store.exists("result.json")
    with cluster() as chaos:
        chaos.add(), chaos.add()
        said = ended(chaos.start("train_slowly", store.uri, "pause=0.3"))
    assert re.search(r"going on from step (4|8|12|16)\.", said) and causes(store) == ["driver lost"]
    assert_equal(store, undisturbed)


def test_two_runs_on_one_cluster_leave_each_other_alone(chaos: Chaos, tmp_path: Path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    stores = [Store(str(tmp_path / name)) for name in ("one", "two")]
    for _ in range(4):
        chaos.add()
    processes = [chaos.start("train_slowly", store.uri, "pause=0.3") for store in stores]
    for store, process in zip(stores, processes, strict=True):
        until_committed(store, process)
    os.kill(int((chaos.pids / "one" / "1").read_text()), signal.SIGKILL)
    for process in processes:
        ended(process)
    assert [causes(store) for store in stores] == [["failure"], []]
    for store in stores:
        assert_equal(store, undisturbed)


def test_a_store_that_is_away_for_a_while(chaos: Chaos, undisturbed) -> None:  # type: ignore[no-untyped-def]
    with s3_server() as server:
        store = Store(f"s3://{server.bucket()}/run")
        chaos.add(), chaos.add()
        process = chaos.start("train_slowly", store.uri, "pause=0.3", **server.env)
        until_committed(store, process)
        server.stop()
        time.sleep(6)
        server.start()
        ended(process)
        assert causes(store) == []
        assert_equal(store, undisturbed)
