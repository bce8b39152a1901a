"""Whether this machine is fit to run the project, line by line, with what to do where it is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import uuid
from dataclasses import dataclass
from importlib import metadata

from rayproj.runtime.submit import auth_mode
from rayproj.storage.store import Store

PACKAGES = (
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "webdataset",
    "wandb",
    "omegaconf",
    "dp-accounting",
)


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    fine: bool
    found: str
    remedy: str = ""


def exclusive_create(store: Store) -> Check:
    """Whether the store lets exactly one of two creators win, which commits stand on."""
    path = f"probe-{uuid.uuid4().hex}"
    try:
        first, second = store.put_once(path, b"1"), store.put_once(path, b"2")
        kept = store.read(path)
    finally:
        store.delete_tree(path)
    fine = first and not second and kept == b"1"
    found = "one of two creators wins" if fine else "both creators win"
    return Check(
        f"store {store.uri}", fine, found, "use a store with conditional writes; commits are not safe on this one"
    )


def checks() -> list[Check]:
    found = [
        Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer"),
    ]
    for name in PACKAGES:
        try:
            found.append(Check(name, True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Check(name, False, "not installed", "run 'make venv', or 'pip install rayproj'"))
    import torch

    gpus = torch.cuda.device_count()
    name = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or f"CPU, {os.cpu_count()} cores"
    found.append(Check("devices", True, name))
    triton = importlib.util.find_spec("triton") is not None
    needed = "" if triton or not gpus else "pip install triton, for the kernels"
    found.append(
        Check("triton", triton or not gpus, "installed" if triton else "not installed; not needed on CPU", needed)
    )
    address = os.environ.get("RAY_ADDRESS", "none: an embedded Ray will be started")
    found.append(Check("ray address", True, address))
    found.append(Check("ray authentication", True, auth_mode()))
    mode = os.environ.get("WANDB_MODE", "offline (the configs' default)")
    keyed = mode != "online" or bool(os.environ.get("WANDB_API_KEY")) or os.path.exists(os.path.expanduser("~/.netrc"))
    found.append(Check("wandb", keyed, mode, "set WANDB_API_KEY, or WANDB_MODE=offline"))
    free = shutil.disk_usage(".").free / 2**30
    found.append(Check("disk", free > 2, f"{free:.0f} GiB free here", "free some space: a demo needs 1 GiB"))
    with tempfile.TemporaryDirectory() as folder:
        found.append(exclusive_create(Store(folder)))
    return found


def print_checks() -> int:
    """Print every check; 0 if all are fine, else 1."""
    found = checks()
    for check in found:
        print(
            f"{'ok ' if check.fine else 'BAD'}  {check.name:<22} {check.found}"
            + ("" if check.fine else f": {check.remedy}")
        )
    return 0 if all(check.fine for check in found) else 1
