"""The Ray cluster that the driver works on: the one it is told of, or one embedded in this process."""

from __future__ import annotations

import logging
import os

import ray


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine; again is harmless.

    A process started by `ray job submit` finds RAY_ADDRESS set.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    # Ray 2.60 turns token authentication on unless told; an embedded cluster listens to this machine alone.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 << 20,  # images never go through it
    )
