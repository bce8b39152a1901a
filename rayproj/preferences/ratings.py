"""The ratings of a study, each a file of its own that is created once.

ratings/<rater>/<slot>.json    an answer; a second one, from a double click or another tab, changes nothing
checks/<rater>/<number>.json   an answer to an attention check

A file shows all at once and is durable before the rater hears of it, on every store (`Store.put_once`); several
servers need not know of each other. Their names say who has rated what. Of two raters' answers to one slot the
earlier counts, so quotas hold exactly.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from rayproj import faults
from rayproj.preferences.plan import LEFT, Plan
from rayproj.storage.store import Store, from_json, to_json

LOOK_SECONDS = 2.0  # between looks at what others have rated, or twenty times as long as a look takes


@dataclass(frozen=True)
class Rating:
    """An answer.

    Attributes:
        number: of the slot, or of the attention check.
        answer: "left", "indifferent" or "right" as the rater saw it; or how many objects.
        seconds: from the images' being there to the answer, as the rater's browser says.
        at: when it came, in unix seconds of the server.
    """

    rater: str
    check: bool
    number: int
    answer: str | int
    seconds: float
    at: float

    @property
    def path(self) -> str:
        return f"{_folder(self.rater, self.check)}/{self.number:08d}.json"


def _folder(rater: str, check: bool) -> str:
    return f"{'checks' if check else 'ratings'}/{rater}"


def put(store: Store, rating: Rating) -> bool:
    """Keep an answer; False if the rater had answered this before, which stands."""
    faults.maybe("rating.before_put")
    kept = store.put_once(rating.path, to_json(asdict(rating)))
    faults.maybe("rating.after_put")
    return kept


def own(store: Store, rater: str, check: bool) -> set[int]:
    """Numbers of the slots, or of the attention checks, that a rater has answered."""
    return {_number(path) for path in store.list(_folder(rater, check))}


def read(store: Store, paths: Iterable[str]) -> list[Rating]:
    """Answers from their files."""
    with ThreadPoolExecutor(16) as threads:
        return [Rating(**from_json(data)) for data in threads.map(store.read, paths)]


def all_of(store: Store, check: bool) -> list[Rating]:
    """Every answer of a study, or every answer to its attention checks."""
    return read(store, store.list("checks" if check else "ratings"))


def passed(plan: Plan, checks: Iterable[Rating]) -> dict[str, tuple[int, int]]:
    """Of each rater who has answered any: attention checks passed, and answered."""
    found: dict[str, tuple[int, int]] = {}
    for rating in checks:
        right, answered = found.get(rating.rater, (0, 0))
        passes = rating.answer == plan.check(rating.rater, rating.number).check
        found[rating.rater] = right + passes, answered + 1
    return found


def inattentive(plan: Plan, checks: Iterable[Rating]) -> set[str]:
    """Raters whose ratings are left out: who failed more than the share `failed` of the attention checks that they
    answered."""
    return {rater for rater, (right, n) in passed(plan, checks).items() if n - right > plan.failed * n}


def counted(plan: Plan, ratings: Iterable[Rating], checks: Iterable[Rating]) -> list[Rating]:
    """The ratings that count, by slot: of attentive raters, the earliest of each slot; those beyond a rater's quotas, which
    several tabs can send at one moment, do not."""
    out, by_rater, first = inattentive(plan, checks), defaultdict[str, list[Rating]](list), dict[int, Rating]()
    for rating in ratings:
        by_rater[rating.rater].append(rating)
    kept = [rating for rater, own in by_rater.items() if rater not in out for rating in within(plan, own)]
    for rating in sorted(kept, key=lambda r: (r.at, r.rater)):
        first.setdefault(rating.number, rating)
    return [first[number] for number in sorted(first)]


def within(plan: Plan, own: Iterable[Rating]) -> list[Rating]:
    """Of all ratings of one rater, those within the quotas: the earlier ones."""
    kept = dict[int, Rating]()
    for rating in sorted(own, key=lambda r: (r.at, r.number)):
        if plan.allows(kept, rating.number):
            kept[rating.number] = rating
    return list(kept.values())


class Progress:
    """Which slots have a rating that counts, as this process knows it; a moment old where there are several servers,
    so that at times two raters rate the same slot."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self._checks: dict[str, Rating] = {}  # by path: an answer never changes
        self._counts = dict[str, tuple[list[int], list[int]]]()  # rater -> slots rated, and those of them that count
        self._taken = np.zeros(plan.slots, bool)
        self._next_look, self._lock = 0.0, threading.Lock()

    def taken(self) -> np.ndarray:
        """bool [slots]."""
        with self._lock:
            began = time.monotonic()
            if began >= self._next_look:
                self._taken = self._look()
                took = time.monotonic() - began
                self._next_look = began + took + max(LOOK_SECONDS, 20 * took)
            return self._taken

    def _look(self) -> np.ndarray:
        new = [path for path in self.store.list("checks") if path not in self._checks]
        self._checks |= dict(zip(new, read(self.store, new), strict=True))
        out = inattentive(self.plan, self._checks.values())
        by_rater = defaultdict[str, list[str]](list)
        for path in self.store.list("ratings"):
            by_rater[path.split("/")[1]].append(path)
        taken = np.zeros(self.plan.slots, bool)
        for rater, paths in by_rater.items():
            if rater not in out:
                taken[self._counting(rater, paths)] = True
        return taken

    def _counting(self, rater: str, paths: list[str]) -> list[int]:
        """Slots whose rating by a rater counts, as for `counted`. Their names tell which they are; when they came, which a
        file alone tells, matters only where there are more than the quotas allow."""
        slots = [_number(path) for path in paths]
        if rater not in self._counts or self._counts[rater][0] != slots:
            unread = [Rating(rater, False, slot, LEFT, 0.0, 0.0) for slot in slots]
            fits = len(within(self.plan, unread)) == len(slots)
            kept = slots if fits else [rating.number for rating in within(self.plan, read(self.store, paths))]
            self._counts[rater] = slots, kept
        return self._counts[rater][1]


def _number(path: str) -> int:
    return int(path.rpartition("/")[2].removesuffix(".json"))
