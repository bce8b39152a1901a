"""Gang placement: all ranks of a group, or none and an explanation."""

from __future__ import annotations

from collections import Counter

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from rayproj.errors import UserError


def place(ranks: int, cpus: float, gpus: float, timeout: float) -> tuple[PlacementGroup, list[tuple[int, int]]]:
    """Reserve one bundle for each rank, together.

    Returns:
        The placement group, and for each rank its bundle and its place on its node, ranks of a node side by side.

    Raises:
        UserError: the cluster could not hold them within `timeout` seconds.
    """
    bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * ranks, strategy="PACK")
    if not group.wait(timeout):
        remove_placement_group(group)
        have, free = ray.cluster_resources(), ray.available_resources()
        supply = ", ".join(f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind} free" for kind in bundle)
        demand = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        raise UserError(
            f"The run needs {ranks} ranks of {demand} each, and after {timeout:g} s the cluster has {supply} on "
            f"{len([n for n in ray.nodes() if n['Alive']])} node(s); lower cluster.ranks or cluster.cpus_per_rank, "
            "or add nodes."
        )
    nodes = placement_group_table(group)["bundles_to_node_id"]
    taken: Counter[str] = Counter()
    order = []
    for bundle_index in sorted(nodes, key=lambda index: (nodes[index], index)):
        order.append((bundle_index, taken[nodes[bundle_index]]))
        taken[nodes[bundle_index]] += 1
    return group, order
