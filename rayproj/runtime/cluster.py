"""The Ray cluster that the driver works on: the one it is told of, or one embedded in this process."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

import ray
import ray._private.state

from rayproj.tracking.progress import say

HEAD_LOOK_SECONDS = 1.0
HEAD_MISSES = 3  # in a row, and the head counts as lost


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine; again is harmless.

    A process started by `ray job submit` finds RAY_ADDRESS set.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        threading.Thread(target=_watch_head, name="head", daemon=True).start()
        return
    # Ray 2.60 turns token authentication on unless told; an embedded cluster listens to this machine alone.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # On a busy machine Serve's proxy takes longer than five seconds to begin, and is killed for it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 << 20,  # images never go through it
    )


def _watch_head() -> None:
    """Say that the head is lost while there is somebody to say it: Ray then ends the process, and no handler runs."""
    address, misses = ray.get_runtime_context().gcs_address, 0
    host, _, port = address.rpartition(":")
    while ray.is_initialized() and misses < HEAD_MISSES:
        time.sleep(HEAD_LOOK_SECONDS)
        try:
            socket.create_connection((host, int(port)), HEAD_LOOK_SECONDS).close()
            misses = 0
        except OSError:
            misses += 1
    if misses == HEAD_MISSES:
        say(
            f"The head of the Ray cluster, {address}, does not answer; if it stays away, Ray ends this driver. Start it "
            "again, and run the same command: the run goes on from its last commit."
        )


def lost_nodes(nodes: set[str]) -> set[str]:
    """Which of these nodes are dead."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return nodes - alive


def silent_nodes(nodes: set[str]) -> set[str]:
    """Which of these nodes Ray still takes for alive, though nobody listens there: it finds out in 5 to 30 seconds."""
    found = set()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] in nodes:
            try:
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), 2.0).close()
            except OSError:
                found.add(node["NodeID"])
    return found


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to go away, as after a spot notice or `ray drain-node`."""
    # Ray Train reads its preemption notices in the same place; there is no public way.
    return set(ray._private.state.state.get_draining_nodes())


def free_resources() -> list[dict[str, float]]:
    """What is free on each node that lives and stays."""
    per_node = ray._private.state.available_resources_per_node()
    gone = draining_nodes() | lost_nodes(set(per_node))
    return [free for node, free in per_node.items() if node not in gone]
