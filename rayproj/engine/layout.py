"""Which elements of which parameters a rank answers for. Pure: any rank can be computed anywhere, for any world size.

ZeRO-1 and 2 lay all trainable parameters end to end, pad, and give each rank an equal interval. ZeRO-3 pads and cuts each
parameter by itself (Rajbhandari et al. 2020, "ZeRO", section 5). ZeRO-0 gives each rank all of it; a rank answers, that
is, writes into a checkpoint, for an interval. Always a rank's share is one flat fp32 tensor, and what lies in it is a list
of pieces, under names that hold at any world size and stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements in a rank's share."""

    name: str
    start: int  # first element, in the flattened parameter
    length: int
    offset: int  # where it begins in the share

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


def pieces(sizes: Mapping[str, int], zero_stage: int, world_size: int, rank: int, share: int) -> list[Piece]:
    """What a rank answers for, in order; each element is one rank's, and padding is left out.

    From ZeRO-1 on that is what its share holds. At ZeRO-0 the share of every rank holds what one alone would answer for.

    Args:
        sizes: elements of each parameter, in the order of the flat vector.
        share: length of a rank's flat tensor, padding included; the same on all ranks.
    """
    found, begin = [], 0  # of the flat vector (0 to 2), or of this rank's share (3)
    interval = share if zero_stage else -(-share // world_size)
    offset = rank * share if zero_stage else 0  # where the share begins in the flat vector
    for name, size in sizes.items():
        if zero_stage == 3:
            part = -(-size // world_size)
            start = rank * part
            length = min(part, size - start)
            if length > 0:
                found.append(Piece(name, start, length, begin))
            begin += part
        else:
            first, last = max(begin, rank * interval), min(begin + size, (rank + 1) * interval)
            if first < last:
                found.append(Piece(name, first - begin, last - first, first - offset))
            begin += size
    return found


@dataclass(frozen=True)
class Run:
    """A run of elements that lie side by side both in the flat vector of all parameters and in a rank's share."""

    start: int  # in the flat vector
    length: int
    offset: int  # in the share


def runs(sizes: Mapping[str, int], held: Iterable[Piece]) -> list[Run]:
    """Pieces as runs of the flat vector, as few as may be: one below ZeRO-3."""
    begins, begin = {}, 0
    for name, size in sizes.items():
        begins[name] = begin
        begin += size
    found: list[Run] = []
    for p in held:
        start = begins[p.name] + p.start
        if found and found[-1].start + found[-1].length == start and found[-1].offset + found[-1].length == p.offset:
            found[-1] = Run(found[-1].start, found[-1].length + p.length, found[-1].offset)
        else:
            found.append(Run(start, p.length, p.offset))
    return found


def cut(share: Tensor, held: Iterable[Piece]) -> dict[str, Tensor]:
    """The pieces of a share by their keys; views."""
    return {p.key: share[p.offset : p.offset + p.length] for p in held}


def join(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pieces of all ranks, by key, as one flat tensor for each parameter."""
    found: dict[str, dict[int, Tensor]] = {}
    for key, tensor in parts.items():
        name, _, start = key.rpartition("@")
        found.setdefault(name, {})[int(start)] = tensor
    return {name: torch.cat([by_start[start] for start in sorted(by_start)]) for name, by_start in found.items()}
