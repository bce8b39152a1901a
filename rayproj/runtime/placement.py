"""Gang placement: all ranks of a group, or none and an explanation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from rayproj.errors import Interrupted
from rayproj.runtime import interrupt


@dataclass(frozen=True)
class Placed:
    """A reserved group: for each rank its bundle and its place on its node, ranks of a node side by side."""

    group: PlacementGroup
    order: list[tuple[int, int]]
    nodes: list[str]  # node ids, by rank


def bundle(cpus: float, gpus: float | None) -> dict[str, float]:
    """What one rank takes; without a number of GPUs, one where the cluster has any."""
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def place(ranks: int, bundle: dict[str, float], patience: Callable[[], float], name: str) -> Placed | None:
    """Reserve one bundle for each rank, together; None if there was no room in time.

    Args:
        patience: seconds to wait in all; asked again and again, as what is known of the cluster changes meanwhile.
        name: shows in Ray's dashboard and `ray list placement-groups`.

    Raises:
        Interrupted: a stop was asked for meanwhile.
    """
    group, began = placement_group([bundle] * ranks, strategy="PACK", name=name), time.monotonic()
    try:
        while not group.wait(max(0.0, min(1.0, began + patience() - time.monotonic()))):
            interrupt.check()
            if time.monotonic() >= began + patience():
                remove_placement_group(group)
                return None
    except Interrupted:
        remove_placement_group(group)
        raise
    nodes = placement_group_table(group)["bundles_to_node_id"]
    taken: Counter[str] = Counter()
    order, ids = [], []
    for index in sorted(nodes, key=lambda index: (nodes[index], index)):
        order.append((index, taken[nodes[index]]))
        ids.append(nodes[index])
        taken[nodes[index]] += 1
    return Placed(group, order, ids)


def shortage(ranks: int, bundle: dict[str, float], waited: float) -> str:
    """Demand against supply, for a person."""
    have, free = ray.cluster_resources(), ray.available_resources()
    supply = ", ".join(f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind} free" for kind in bundle)
    demand = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    alive = sum(node["Alive"] for node in ray.nodes())
    return (
        f"The run needs {ranks} ranks of {demand} each, and after {waited:g} s the cluster has {supply} on {alive} "
        "node(s); lower cluster.ranks or cluster.cpus_per_rank, set cluster.min_ranks to go on with fewer, or add nodes."
    )
