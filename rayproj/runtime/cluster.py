"""The Ray cluster that the driver works on: the one it is told of, or one embedded in this process."""

from __future__ import annotations

import logging
import os

import ray
import ray._private.state


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


def lost_nodes(nodes: set[str]) -> set[str]:
    """Which of these nodes are dead."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return nodes - alive


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to go away, as after a spot notice or `ray drain-node`."""
    # Ray Train reads its preemption notices in the same place; there is no public way.
    return set(ray._private.state.state.get_draining_nodes())


def free_resources() -> list[dict[str, float]]:
    """What is free on each node that lives and stays."""
    per_node = ray._private.state.available_resources_per_node()
    gone = draining_nodes() | lost_nodes(set(per_node))
    return [free for node, free in per_node.items() if node not in gone]
