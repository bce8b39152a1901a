"""cluster/slurm/submit.sbatch on a real Slurm of two nodes, which are two slurmd on this machine."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import images
from tests.support.commands import ROOT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="needs root and Debian's packages munge slurmctld slurmd slurm-client",
)

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
KillWait=5
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.config = folder / "slurm.conf"
        self.config.write_text(CONFIG.format(folder=folder, ports=free_ports(3)))

    def run(self, *command: str) -> str:
        variables = environment(SLURM_CONF=str(self.config))
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Without a database there is no sacct, but the controller remembers the job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    files = ["socket", "pid-file", "log-file", "seed-file"]
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/key"]
    munged += [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in files]
    made = Slurm(folder)
    started = []

    def start(*command: str) -> None:
        log = open(folder / "daemons.log", "ab")
        started.append(
            subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True, cwd=folder)
        )

    start(*munged)
    try:
        until((folder / "munge.socket").exists, 10, "munge socket")
        start("slurmctld", "-D", "-f", str(made.config))
        for node in ("node1", "node2"):
            start("slurmd", "-D", "-f", str(made.config), "-N", node)
        ready = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        until(lambda: _answer(made, ready) == "2", 30, "two idle nodes")
        yield made
    finally:
        _answer(made, ["scancel", "--user=root"])
        until(lambda: not _answer(made, ["squeue", "--noheader"]), 30, "empty queue")
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _answer(slurm: Slurm, command: list[str]) -> str:
    done = subprocess.run(
        command, env=environment(SLURM_CONF=str(slurm.config)), capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()


@pytest.mark.timeout(280)
def test_a_job_on_two_nodes_commits_before_its_time_is_up_and_goes_on_when_it_is_back(
    slurm: Slurm, tmp_path: Path
) -> None:
    images.write(f"{tmp_path}/data", 400, 100)
    words = [
        f"data={tmp_path}/data",
        f"run.dir={tmp_path}/run",
        "train.steps=200",
        "train.batch=8",
        "train.log_every=5",
    ]
    words += ["autoencoder.channels=[8,8,8]", "cluster.ranks=2", "train.checkpoint.every_seconds=1000"]
    job = ["jobs/train_autoencoder.py", "configs/train_autoencoder.yaml", *words]
    log = tmp_path / "log"
    sent = slurm.run("sbatch", "--parsable", "-N", "2", f"--output={log}", "cluster/slurm/submit.sbatch", *job)
    number = sent.strip()
    try:
        until((tmp_path / "run" / "metrics.jsonl").exists, 120, "metrics")
        # What Slurm sends two minutes before the end: to the batch shell alone.
        slurm.run("scancel", "--batch", "--signal=USR1", number)
        until(lambda: slurm.job(number)["Reason"] == "BeginTime", 60, "requeue")
        slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")  # Slurm would have it wait two minutes
        until(lambda: slurm.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 150, "end of the job")
    except BaseException:
        print(log.read_text() if log.exists() else "no log")
        raise
    job_info, text = slurm.job(number), log.read_text()
    assert (job_info["JobState"], job_info["ExitCode"], job_info["NumNodes"]) == ("COMPLETED", "0:0", "2"), text
    assert text.count("Stopping after a commit") == 1 and text.count("Stopped; everything is committed") == 1
    # A node has one CPU and a rank needs one, so two ranks took both nodes.
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["ranks"], result["samples_seen"]) == (200, 2, 1600)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "a step was done twice"
    assert text.count("Ray runtime started") == 4, "two nodes, twice"
    assert not list(Path("/tmp").glob(f"ray-{number}-*")), "left behind"
