"""A rater who answers whatever there is for them, as a server keeps it: `python -m tests.support.rate FOLDER RATER`."""

from __future__ import annotations

import sys
import time

from rayproj.preferences import ratings
from rayproj.preferences.plan import open_plan
from rayproj.preferences.ratings import Progress, Rating
from rayproj.storage.store import Store

if __name__ == "__main__":
    store, rater = Store(sys.argv[1]), sys.argv[2]
    plan = open_plan(store)
    progress = Progress(plan, store)

    def own(check: bool) -> set[int]:
        return ratings.own(store, rater, check)

    while turn := plan.next(rater, own(False), own(True), progress.taken()):
        answer = plan.turn(turn, rater).check or "left"
        assert ratings.put(store, Rating(rater, turn.check, turn.number, answer, 1.0, time.time()))
