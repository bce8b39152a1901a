"""cluster/local.sh with more than one node, and cluster/spot.py as one more."""

import http.server
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment, run


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.5)


def free_ports(count: int, low: int) -> list[int]:
    """Ports outside Ray's workers' range, 10002 to 19999."""
    found: list[int] = []
    for port in range(low + os.getpid() % 500, 9900):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def processes_below(*folders: str) -> set[int]:
    """What has one of the folders on its command line, as most of Ray's do."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_text()
            if any(folder in line for folder in folders) and "State:\tZ" not in (entry / "status").read_text():
                found.add(int(entry.name))
        except OSError:
            pass
    return found


class Local:
    """A head without CPUs and two raylets of one CPU each."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="rp", dir="/tmp")  # Ray's sockets need a short path
        self.gcs, self.dashboard, client = free_ports(3, 7400)
        command = [str(ROOT / "cluster" / "local.sh"), str(self.gcs), str(self.dashboard), "--num-cpus=0"]
        command += [f"--ray-client-server-port={client}", f"--temp-dir={self.folder}"]
        variables = environment(NODES="2", NODE_OPTIONS="--num-cpus=1 --object-store-memory=80000000")
        self.process = subprocess.Popen(command, env=variables, start_new_session=True, stdout=subprocess.DEVNULL)

    def state(self, kind: str, **wanted: object) -> list[dict]:
        """Of the API behind `ray list`, which itself takes seconds."""
        try:
            answer = urllib.request.urlopen(f"{self.address}/api/v0/{kind}?detail=true&limit=100", timeout=5)
            rows = json.load(answer)["data"]["result"]["result"]
        except OSError:  # the head is not up yet
            return []
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def nodes(self) -> list[dict]:
        return self.state("nodes", state="ALIVE")


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    started = Local()
    try:
        until(lambda: len(started.nodes()) == 3, 90, "three nodes")
        yield started
    finally:
        started.process.terminate()
        try:
            started.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(started.process.pid, signal.SIGKILL)
        shutil.rmtree(started.folder, ignore_errors=True)


@pytest.mark.timeout(200)
def test_two_ranks_are_on_two_nodes(local: Local, tmp_path: Path) -> None:
    submit = [sys.executable, "-m", "rayproj.cli", "submit"]
    send = ["--address", local.address, "--follow"]
    source = ["data.source.kind=fashion_mnist", 'data.source.path=""', "data.fractions={public: 0.1, rest: 0.9}"]
    words = [*source, f"data.out={tmp_path}/data", f"run.dir={tmp_path}/import"]
    done = run(*submit, "jobs/import_data.py", "configs/import_data.yaml", *words, *send)
    assert done.returncode == 0, done.stdout + done.stderr

    words = [f"data={tmp_path}/data/public", f"run.dir={tmp_path}/ae", "train.steps=4", "train.batch=8"]
    words += ["autoencoder.channels=[8,8,8]", "cluster.ranks=2"]
    done = run(*submit, "jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", *words, *send)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "ae" / "result.json").read_text())
    assert (result["steps"], result["ranks"], result["restarts"]) == (4, 2, {})

    ranks = local.state("actors", class_name="_Rank")
    places = [rank["node_id"] for rank in ranks]
    head = next(node["node_id"] for node in local.nodes() if node["is_head_node"])
    assert len(places) == len(set(places)) == 2 and head not in places, (places, head)


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata of an instance of AWS and of Google; `notice` is whether it is to be taken."""

    notice = False

    def do_PUT(self) -> None:
        self._say("a token" if self.path == "/latest/api/token" else "")

    def do_GET(self) -> None:
        if self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._say("TRUE" if Metadata.notice else "FALSE")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.headers["X-aws-ec2-metadata-token"]:
            self._say('{"action": "terminate"}' if Metadata.notice else "")
        else:
            self._say("")

    def _say(self, text: str) -> None:
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Metadata.notice = False
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_both_clouds_are_asked_as_they_answer(metadata: str, monkeypatch: pytest.MonkeyPatch, cloud: str) -> None:
    noticed = runpy.run_path(str(ROOT / "cluster" / "spot.py"))["noticed"]
    monkeypatch.setenv("METADATA_URL", metadata)
    assert not noticed(cloud)
    Metadata.notice = True
    assert noticed(cloud)
    monkeypatch.setenv("METADATA_URL", "http://127.0.0.1:9")
    assert not noticed(cloud)


@pytest.mark.timeout(200)
def test_a_spot_node_drains_when_the_cloud_gives_notice(local: Local, metadata: str) -> None:
    before = {node["node_id"] for node in local.nodes()}
    command = [sys.executable, "cluster/spot.py", "aws", f"--address=127.0.0.1:{local.gcs}"]
    variables = environment(METADATA_URL=metadata)
    options = ["--disable-usage-stats", "--num-cpus=1", "--object-store-memory=80000000"]
    process = subprocess.Popen(
        [*command, *options], env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until(lambda: len(local.nodes()) == 4, 60, "a fourth node")
        (node,) = {node["node_id"] for node in local.nodes()} - before
        Metadata.notice = True
        said, _ = process.communicate(timeout=30)
    finally:
        process.terminate()
    assert "Notice: this instance is to be taken" in said and "finished draining" in said, said
    (gone,) = local.state("nodes", node_id=node)
    assert gone["state"] == "DEAD" and "preempt" in gone["state_message"].lower(), gone
    # The autoscaler would start Ray there again, which would take ranks to a node that goes.
    again = run(*command, METADATA_URL=metadata)
    assert again.returncode == 0 and "Ray is not started" in again.stdout


def test_a_signal_ends_all_of_it_and_nothing_else(local: Local) -> None:
    """The last test here: it ends the cluster."""
    # By such a word on the command line `ray stop` knows processes of any Ray of this user.
    decoy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "log_monitor.py"])
    try:
        folders = (local.folder, f"/tmp/ray-{local.gcs}-")
        assert len(processes_below(*folders)) > 5
        local.process.terminate()
        assert local.process.wait(30) == 143
        until(lambda: not processes_below(*folders), 10, "end of all processes")
        assert not list(Path("/tmp").glob(f"ray-{local.gcs}-*"))
        assert decoy.poll() is None
    finally:
        decoy.kill()
