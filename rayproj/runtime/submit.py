"""Submission over Ray's job API: checked before it is sent."""

from __future__ import annotations

import fnmatch
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayproj.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Ray's dashboard refuses a body of more than 100 MiB, with 413.
MAX_BYTES = 95 << 20
HEAD_SECONDS = 300.0  # to wait for a head that does not answer
AGENT_SECONDS = 200.0  # until the agent of a head that has just come up answers
EXCLUDES = [
    ".git",
    ".venv",
    "runs",
    "wandb",
    "dist",
    "build",
    "secret",
    "__pycache__",
    "*.tar",
    "*_cache",
    "*.egg-info",
]


@dataclass(frozen=True)
class Request:
    """One job to be run on a cluster."""

    job: str
    config: str
    overrides: list[str]
    folder: Path  # what is sent; the job's working directory there
    values: dict[str, Any] = field(default_factory=dict)  # of the config, where it is known what the job makes of it

    @property
    def entrypoint(self) -> str:
        return " ".join(["python", *map(shlex.quote, [self.job, self.config, *self.overrides])])


def sent_files(folder: Path) -> dict[str, int]:
    """Bytes of every file that would be sent, by path relative to the folder."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _excluded(name)]
        for name in names:
            if not _excluded(name):
                file = Path(path) / name
                found[str(file.relative_to(folder))] = file.lstat().st_size
    return found


def _excluded(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDES)


def check(request: Request) -> dict[str, int]:
    """The files that would be sent.

    Raises:
        UserError: the job or config is not among them, nor is a file that the config names, or they are too large for Ray's
            job API.
    """
    files = sent_files(request.folder)
    for path in (request.job, request.config):
        if os.path.normpath(path) not in files:
            raise UserError(f"'{path}' is not a file below {request.folder}; run this in the checkout's folder.")
    for path in _texts(request.values):
        here = not os.path.isabs(path) and os.path.isfile(request.folder / path)
        if here and os.path.normpath(path) not in files:
            raise UserError(
                f"'{path}' is not sent; put it on every node, where others cannot read it, and give that path."
            )
    total = sum(files.values())
    if total > MAX_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:5]
        names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in largest)
        raise UserError(
            f"The working directory has {total / 2**20:.0f} MiB, and Ray's job API takes 100; "
            f"move or delete the largest: {names}."
        )
    return files


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def describe(request: Request) -> str:
    """What `submit` would send."""
    files = check(request)
    return (
        f"entrypoint   {request.entrypoint}\n"
        f"working dir  {request.folder}: {len(files)} files, {sum(files.values()) / 2**20:.1f} MiB\n"
        f"excludes     {' '.join(EXCLUDES)}\n"
        f"auth         {auth_mode()}"
    )


def auth_mode() -> str:
    """Ray's authentication mode, said explicitly: what the environment says, else by whether there is a token."""
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").exists()
    return os.environ.get("RAY_AUTH_MODE") or ("token" if token else "disabled")


def submit(request: Request, address: str | None, follow: bool, retries: int = 0) -> int:
    """Send the job; with `follow`, print its log and end as it does.

    Args:
        address: of the cluster's dashboard; None: RAY_API_SERVER_ADDRESS.
        retries: how often the job is sent again when its driver or the head was lost, or it failed for another reason
            than its input. It then goes on from its last commit.

    Returns:
        0 if it was sent, or succeeded; else the exit code of the job's driver, or 1.

    Raises:
        UserError: nothing answers at the address, or the request cannot be sent.
    """
    check(request)
    client = connect(address)
    for left in range(retries, -1, -1):
        job = _send(client, request)
        if not follow and not retries:
            return 0
        code = _follow(client, job)
        if code in (0, 2) or code is None or not left:
            return 1 if code is None else code
        print(f"{job} is sent again, and goes on from its last commit; {left - 1} more times.", flush=True)
    raise AssertionError


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the dashboard at an address, by default that of RAY_API_SERVER_ADDRESS.

    Raises:
        UserError: there is no address, nothing answers there, or it wants another token.
    """
    os.environ["RAY_AUTH_MODE"] = auth_mode()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("Give the cluster's dashboard: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS.")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"The cluster at {address} wants its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it."
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"No Ray dashboard answers at {address} ({str(error).splitlines()[0]}); check the address."
        ) from error


def _send(client: JobSubmissionClient, request: Request) -> str:
    environment = {"RAY_AUTH_MODE": auth_mode(), "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            job: str = client.submit_job(
                entrypoint=request.entrypoint,
                runtime_env={"working_dir": str(request.folder), "excludes": EXCLUDES, "env_vars": environment},
            )
            break
        except RuntimeError as error:  # a head that has just come up answers before its agent does
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)
    print(f"submitted {job} to {client.get_address()}", flush=True)
    return job


def _follow(client: JobSubmissionClient, job: str) -> int | None:
    """Print the job's log until it ends; returns its driver's exit code, 1 if it was lost, None if a person stopped it.

    A head that does not answer is waited for; one that came back without its memory has lost the job.
    """
    from ray.job_submission import JobStatus

    shown, answered = 0, time.monotonic()
    while True:
        try:
            details = client.get_job_info(job)
            log = client.get_job_logs(job)
        except RuntimeError as error:  # what the head answers
            if "404" not in str(error) and time.monotonic() - answered < HEAD_SECONDS:
                time.sleep(1)
                continue
            print(f"{job}: lost with its head", flush=True)
            return 1
        except OSError as error:  # requests' are
            if time.monotonic() - answered > HEAD_SECONDS:
                raise UserError(
                    f"The head has not answered for {HEAD_SECONDS:.0f} s ({type(error).__name__}); start it again, and "
                    "then send the same command: the run goes on from its last commit."
                ) from error
            time.sleep(1)
            continue
        answered = time.monotonic()
        print(log[shown:], end="", flush=True)
        shown = len(log)
        if details.status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            print(f"{job}: {details.status.value.lower()}", flush=True)
            if details.status is JobStatus.STOPPED:
                return None
            return 0 if details.status is JobStatus.SUCCEEDED else details.driver_exit_code or 1
        time.sleep(1)
