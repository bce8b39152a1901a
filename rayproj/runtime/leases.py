"""Who makes which shard: a table in the driver's memory, rebuilt from the commits at every start. Pure; time is given."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SOONEST = 10.0  # seconds before which no shard is called late
KNOWN = 5  # shards that must be done before it is known what late is
REMEMBERED = 256  # of them, the last


@dataclass
class Leases:
    """Shards are granted in order, at most `max_ahead` beyond what the slowest consumer has read.

    A shard whose holder was lost, or is late with it, is granted again; several may then make it, and the exclusive commit
    lets one win. One that was lost `max_tries` times is set aside: it is not granted any more.

    Attributes:
        together: shards in a row whose samples share batches. A holder is given the next one of its row where it can be, and
            a row of its own before a shard of another's, since what lies at a border would be drawn twice.
    """

    num_shards: int
    lease_seconds: float  # after which a shard is late at the latest
    max_ahead: int | None = None  # None: there is no consumer
    max_tries: int = 3
    together: int = 1
    done: set[int] = field(default_factory=set)
    held: dict[int, tuple[str, float]] = field(default_factory=dict)  # shard -> (holder, since)
    failures: dict[int, int] = field(default_factory=dict)
    aside: set[int] = field(default_factory=set)
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # seconds of each shard
    _last: dict[str, int] = field(default_factory=dict)  # holder -> what it was given last
    _first: int = 0  # all before it are done

    def grant(self, holder: str, now: float, consumed: int = 0) -> int | None:
        """The next shard for a holder, or None if none may be granted now.

        Args:
            consumed: shards that the slowest consumer is through with.
        """
        limit = self.num_shards if self.max_ahead is None else min(self.num_shards, consumed + self.max_ahead)
        while self._first in self.done or self._first in self.aside:
            self._first += 1
        late = now - self.deadline
        shard = next((s for s in self._wanted(holder, limit) if self._free(s, late)), None)
        if shard is not None:
            self.held[shard], self._last[holder] = (holder, now), shard
        return shard

    def _wanted(self, holder: str, limit: int) -> Iterator[int]:
        """Shards in the order in which a holder should have them."""
        after = self._last.get(holder, -1) + 1
        if after % self.together and self._first <= after < limit:
            yield after
        if self.together > 1:
            yield from range(self._first + -self._first % self.together, limit, self.together)
        yield from range(self._first, limit)

    def _free(self, shard: int, late: float) -> bool:
        """Whether nobody has made it, or holds it since a moment after `late`."""
        if shard in self.done or shard in self.aside:
            return False
        return shard not in self.held or self.held[shard][1] <= late

    @property
    def deadline(self) -> float:
        """Seconds after which a shard is late: three times what all but a twentieth of them took."""
        if len(self._took) < KNOWN:
            return self.lease_seconds
        usual = sorted(self._took)[math.ceil(0.95 * len(self._took)) - 1]
        return min(self.lease_seconds, max(SOONEST, 3 * usual))

    def finish(self, shard: int, now: float) -> bool:
        """A shard was committed, by whomever; whether it was not known to be."""
        if shard in self.held:
            self._took.append(now - self.held.pop(shard)[1])
        new = shard not in self.done
        self.done.add(shard)
        self.aside.discard(shard)
        return new

    def lose(self, holder: str, shard: int | None = None) -> None:
        """A holder is gone: what it held is free, and what it was making has failed once more."""
        self.held = {s: entry for s, entry in self.held.items() if entry[0] != holder}
        self._last.pop(holder, None)
        if shard is not None and shard not in self.done:
            self.failures[shard] = self.failures.get(shard, 0) + 1
            if self.failures[shard] >= self.max_tries:
                self.aside.add(shard)

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to be granted."""
        return len(self.done) + len(self.aside) == self.num_shards


class PoisonShard(RuntimeError):
    """A shard kills whoever makes it."""


def slowest(watermarks: dict[str, int], expected: Iterable[str]) -> int:
    """Shards that every expected consumer is through with; one that was not heard of is at 0."""
    return min((watermarks.get(name, 0) for name in expected), default=0)
