"""Whether this machine is fit to run the project, line by line, with what to do where it is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from rayproj.errors import UserError
from rayproj.runtime import submit
from rayproj.storage.store import Store

# What a user would look for first; the rest is mentioned only where it is not well.
SHOWN = ("torch", "ray", "deepspeed", "diffusers", "transformers", "webdataset", "wandb", "omegaconf", "dp-accounting")
REACH_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    fine: bool
    found: str
    remedy: str = ""


def packages() -> list[Check]:
    """The versions of what the project stands on, against what it asks for."""
    found = [Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")]
    try:
        needed = [Requirement(text) for text in metadata.requires("rayproj") or []]
    except metadata.PackageNotFoundError:  # a Ray job's working dir has the code without its metadata
        needed = [Requirement(name) for name in SHOWN]
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        remedy = f"run 'make venv', or: pip install '{one.name}{one.specifier}'"
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            found.append(Check(one.name, False, "not installed", remedy))
            continue
        fine = one.specifier.contains(version, prereleases=True)
        if one.name in SHOWN or not fine:
            found.append(Check(one.name, fine, version, remedy))
    return found


def devices() -> list[Check]:
    import torch

    gpus = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus))
    built = torch.version.cuda is not None or torch.version.hip is not None
    blind = not gpus and Path("/proc/driver/nvidia").exists()
    remedy = "check the driver (nvidia-smi)" if built else "install a CUDA build of torch to use the GPU"
    found = [Check("devices", not blind, names or f"CPU, {os.cpu_count()} cores", remedy)]
    triton = importlib.util.find_spec("triton") is not None
    text = "installed" if triton else "not installed" + ("" if gpus else "; not needed on CPU")
    found.append(Check("triton", triton or not gpus, text, "pip install triton, for the kernels"))
    return found


def cluster() -> list[Check]:
    """What RAY_ADDRESS and RAY_API_SERVER_ADDRESS lead to."""
    mode = submit.auth_mode()
    found = [Check("ray authentication", True, mode), _ray_address(os.environ.get("RAY_ADDRESS"))]
    dashboard = os.environ.get("RAY_API_SERVER_ADDRESS")
    if dashboard:
        try:
            submit.connect(dashboard)
            found.append(Check("ray dashboard", True, f"{dashboard} answers"))
        except UserError as error:
            found.append(Check("ray dashboard", False, "RAY_API_SERVER_ADDRESS is set", str(error)))
    return found


def _ray_address(address: str | None) -> Check:
    if not address:
        return Check("ray address", True, "none: an embedded Ray will be started")
    remedy = "start that cluster (cluster/local.sh starts one here), correct RAY_ADDRESS, or unset it"
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for half a minute
            socket.create_connection((host, int(port)), REACH_SECONDS).close()
        import ray

        from rayproj.runtime.cluster import connect

        connect()
    except Exception as error:
        return Check("ray address", False, f"{address} cannot be used ({type(error).__name__})", remedy)
    have, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    ray.shutdown()
    text = f"{address}: {nodes} nodes, {have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU"
    return Check("ray address", True, text)


def tracking() -> Check:
    mode = os.environ.get("WANDB_MODE", "offline (the configs' default)")
    keyed = bool(os.environ.get("WANDB_API_KEY")) or os.path.exists(os.path.expanduser("~/.netrc"))
    return Check("wandb", mode != "online" or keyed, mode, "set WANDB_API_KEY, or WANDB_MODE=offline")


def disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    return Check("disk", free > 2, f"{free:.0f} GiB free here", "free some space: a demo needs 1 GiB")


def storage(uri: str) -> Check:
    """Whether exactly one of two creators of a file wins there, which commits stand on."""
    path = f".doctor-{uuid.uuid4().hex}"
    try:
        store = Store(uri)
        exclusive = store.exclusive and store.put_once(path, b"1") and not store.put_once(path, b"2")
        store.delete_tree(path)
    except UserError as error:
        return Check("store", False, f"{uri} cannot be used", str(error))
    except Exception as error:
        text = f"{uri} cannot be used ({type(error).__name__})"
        return Check("store", False, text, "correct the address, or make it writable")
    text = "of two creators of a file one wins" if exclusive else "both of two creators of a file win"
    remedy = "let one driver alone work on a run, or use a store with conditional writes"
    return Check("store", exclusive, f"{store.uri}: {text}", remedy)


def print_checks(uri: str) -> int:
    """Print a line for each check; 0 if all is fine, else 1.

    Args:
        uri: of the store that runs are to be kept in.
    """
    found = [*packages(), *devices(), *cluster(), tracking(), disk(), storage(uri)]
    for check in found:
        print(
            f"{'ok ' if check.fine else 'BAD'}  {check.name:<22} {check.found}"
            + ("" if check.fine else f": {check.remedy}")
        )
    return 0 if all(check.fine for check in found) else 1
