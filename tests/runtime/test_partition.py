"""A cut link between two hosts, each with a network of its own: network namespaces and a veth pair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayproj.storage.store import Store
from tests.runtime.test_chaos import RAY, assert_equal, causes, ended, until, until_committed
from tests.support import regression
from tests.support.commands import ROOT, environment
from tests.support.ranks import run_ranks

STEPS = 16
HERE, THERE = "10.77.0.1", "10.77.0.2"
PORT = 9377 + os.getpid() % 500  # outside Ray's workers' range


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """This host, and another behind a link. Ray's processes are ours to end, and no others."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.link, self.folder = name, f"{name}a", folder
        quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "500"}
        quick |= {"RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "0"}
        self.env = environment(PYTHONPATH=str(ROOT), RAYPROJ_TEST_PIDS=str(folder), **quick)
        self.processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("addr", "add", f"{HERE}/24", "dev", self.link)
        ip("link", "set", self.link, "up")
        for words in (["addr", "add", f"{THERE}/24", "dev", f"{name}b"], ["link", "set", f"{name}b", "up"]):
            ip("-n", name, *words)
        ip("-n", name, "link", "set", "lo", "up")

    def start(self, *words: str, host: str = HERE) -> None:
        """A node of Ray with room for one rank."""
        away = ["ip", "netns", "exec", self.name] if host == THERE else []
        common = ["--block", "--disable-usage-stats", "--num-cpus=1", f"--node-ip-address={host}"]
        common += [f"--object-store-memory={80 << 20}"]
        command = [*away, RAY, "start", *words, *common]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen(command, env=self.env, **quiet))  # type: ignore[call-overload]

    def join(self, host: str) -> None:
        self.start(f"--address={HERE}:{PORT}", host=host)

    def cut(self) -> None:
        ip("link", "set", self.link, "down")

    def end(self) -> None:
        for process in self.processes:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in family:
                one.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", self.link], check=False)
        subprocess.run(["ip", "netns", "del", self.name], check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    name = f"rp{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", f"{name}x"], capture_output=True).returncode:
        pytest.skip("this machine does not allow network namespaces")
    ip("netns", "del", f"{name}x")
    with tempfile.TemporaryDirectory(prefix="rp", dir="/tmp", ignore_cleanup_errors=True) as folder:
        found = Hosts(name, Path(folder))
        try:
            yield found
        finally:
            found.end()


@pytest.mark.timeout(200)
def test_ranks_behind_a_cut_link_are_replaced_and_the_numbers_are_the_same(hosts: Hosts, tmp_path: Path) -> None:
    undisturbed = run_ranks(regression.run, 2, str(tmp_path / "undisturbed"), regression.config(STEPS), "only")
    store = Store(str(tmp_path / "run"))
    hosts.start("--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={hosts.folder}/ray")
    hosts.join(THERE)
    words = [f"run.dir={store.uri}", "cluster.ranks=2", f"steps={STEPS}", "pause=0.5", "cluster.min_ranks=2"]
    command = [sys.executable, "-m", "tests.support.drive", "tests.support.entries:train_slowly", *words]
    env = hosts.env | {"RAY_ADDRESS": f"{HERE}:{PORT}"}
    driver = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        until_committed(store, driver)
        places = [psutil.Process(int((hosts.folder / "run" / str(rank)).read_text())) for rank in (0, 1)]
        spaces = {os.readlink(f"/proc/{process.pid}/ns/net") for process in places}
        assert len(spaces) == 2, "the ranks are to be on two hosts"
        hosts.cut()
        until(lambda: causes(store) == ["node lost"], driver, seconds=40)
        hosts.join(HERE)
        said = ended(driver)
    finally:
        driver.kill()
    assert "A node was lost; starting again from the last commit" in said
    assert causes(store) == ["node lost"] and json.loads(store.read("result.json"))["ranks"] == 2
    assert_equal(store, {name: tensor.numpy() for name, tensor in undisturbed[0]["weights"].items()})
