"""Which rank this process is, of how many, on which device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """A rank's place. The process group of torch.distributed is initialised before one is handed out."""

    rank: int
    world_size: int
    local_rank: int  # rank among the processes of this node
    device: str  # "cpu" or "cuda:<index>"
