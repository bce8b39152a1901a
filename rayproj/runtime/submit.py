"""Submission over Ray's job API: checked before it is sent."""

from __future__ import annotations

import fnmatch
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from rayproj.errors import UserError

# Ray's dashboard refuses a body of more than 100 MiB, with 413.
MAX_BYTES = 95 << 20
EXCLUDES = [".git", ".venv", "runs", "wandb", "dist", "build", "__pycache__", "*.tar", "*_cache", "*.egg-info"]


@dataclass(frozen=True)
class Request:
    """One job to be run on a cluster."""

    job: str
    config: str
    overrides: list[str]
    folder: Path  # what is sent; the job's working directory there

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
        UserError: the job or config is not among them, or they are too large for Ray's job API.
    """
    files = sent_files(request.folder)
    for path in (request.job, request.config):
        if os.path.normpath(path) not in files:
            raise UserError(f"'{path}' is not a file below {request.folder}; run this in the checkout's folder.")
    total = sum(files.values())
    if total > MAX_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:5]
        names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in largest)
        raise UserError(
            f"The working directory has {total / 2**20:.0f} MiB, and Ray's job API takes 100; "
            f"move or delete the largest: {names}."
        )
    return files


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


def submit(request: Request, address: str | None, follow: bool) -> int:
    """Send the job; with `follow`, print its log and return 0 if it succeeded.

    Raises:
        UserError: nothing answers at the address, or the request cannot be sent.
    """
    check(request)
    os.environ["RAY_AUTH_MODE"] = auth_mode()
    from ray.job_submission import JobStatus, JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("Give the cluster's dashboard: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS.")
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"No Ray dashboard answers at {address} ({str(error).splitlines()[0]}); check the address."
        ) from error
    job = client.submit_job(
        entrypoint=request.entrypoint,
        runtime_env={
            "working_dir": str(request.folder),
            "excludes": EXCLUDES,
            "env_vars": {"RAY_AUTH_MODE": auth_mode(), "PYTHONUNBUFFERED": "1"},
        },
    )
    print(f"submitted {job} to {address}", flush=True)
    if not follow:
        return 0
    shown = 0
    while True:
        state = client.get_job_status(job)
        log = client.get_job_logs(job)
        print(log[shown:], end="", flush=True)
        shown = len(log)
        if state in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            print(f"{job}: {state.value.lower()}", flush=True)
            return 0 if state is JobStatus.SUCCEEDED else 1
        time.sleep(1)
