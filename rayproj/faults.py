"""Named points at which a test can kill the process: `RAYPROJ_FAULT=point:rank:hit`.

The process dies with SIGKILL the `hit`-th time (from 1) that `point` is passed by `rank`; `*` is any rank. Nothing is
flushed and no handler runs, as when a node is lost. The variable `RAYPROJ_FAULT_ONCE` may name a file that is created on
the kill, and whose presence disarms the fault, so that the restarted process lives.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_hits: Counter[str] = Counter()


def maybe(point: str, rank: int = 0) -> None:
    """Die here if the environment says so.

    Args:
        point: name of the place, `component.before_or_after_what`.
        rank: this process's rank.
    """
    armed = os.environ.get("RAYPROJ_FAULT")
    if not armed:
        return
    name, at_rank, at_hit = armed.split(":")
    if name != point or at_rank not in ("*", str(rank)):
        return
    _hits[point] += 1
    once = os.environ.get("RAYPROJ_FAULT_ONCE")
    if _hits[point] == int(at_hit) and not (once and os.path.exists(once)):
        if once:
            open(once, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
