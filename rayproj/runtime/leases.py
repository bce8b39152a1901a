"""Who makes which shard: a table in the driver's memory, rebuilt from the commits at every start. Pure; time is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Leases:
    """Shards are granted in order, at most `max_ahead` beyond what the slowest consumer has read.

    A shard whose holder was lost, or held it beyond `lease_seconds`, is granted again; several may then make it, and
    the exclusive commit lets one win.
    """

    num_shards: int
    lease_seconds: float
    max_ahead: int | None = None  # None: there is no consumer
    max_tries: int = 3
    done: set[int] = field(default_factory=set)
    held: dict[int, tuple[str, float]] = field(default_factory=dict)  # shard -> (holder, since)
    tries: dict[int, int] = field(default_factory=dict)
    _first: int = 0  # all before it are done

    def grant(self, holder: str, now: float, consumed: int = 0) -> int | None:
        """The next shard for a holder, or None if none may be granted now.

        Args:
            consumed: shards that the slowest consumer is through with.

        Raises:
            PoisonShard: the shard was tried too often.
        """
        limit = self.num_shards if self.max_ahead is None else min(self.num_shards, consumed + self.max_ahead)
        while self._first in self.done:
            self._first += 1
        for shard in range(self._first, limit):
            if shard in self.done:
                continue
            if shard in self.held and now - self.held[shard][1] < self.lease_seconds:
                continue
            if self.tries.get(shard, 0) >= self.max_tries:
                raise PoisonShard(f"Shard {shard} failed {self.max_tries} times; see the log of the last failure.")
            self.held[shard] = (holder, now)
            self.tries[shard] = self.tries.get(shard, 0) + 1
            return shard
        return None

    def finish(self, shard: int) -> None:
        """A shard was committed, by whomever."""
        self.done.add(shard)
        self.held.pop(shard, None)

    def lose(self, holder: str) -> None:
        """A holder is gone: what it held is free."""
        self.held = {shard: entry for shard, entry in self.held.items() if entry[0] != holder}

    @property
    def complete(self) -> bool:
        return len(self.done) == self.num_shards


class PoisonShard(RuntimeError):
    """A shard kills whoever makes it."""


def slowest(watermarks: dict[str, int], expected: Iterable[str]) -> int:
    """Shards that every expected consumer is through with; one that was not heard of is at 0."""
    return min((watermarks.get(name, 0) for name in expected), default=0)
