"""Ratings are counted once, whoever sends them how often."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from rayproj.preferences import ratings
from rayproj.preferences.ratings import Progress, Rating, counted, inattentive
from rayproj.storage.store import Store
from tests.support.studies import made


def rating(rater: str, number: int, answer: str | int = "left", at: float = 0.0, check: bool = False) -> Rating:
    return Rating(rater, check, number, answer, 1.5, at)


def test_the_first_answer_stands_also_when_many_come_at_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sent = [rating("r0001", 7, answer, at) for at in range(8) for answer in ("left", "right")]
    with ThreadPoolExecutor(8) as threads:
        kept = list(threads.map(lambda one: ratings.put(store, one), sent))
    assert sum(kept) == 1
    assert ratings.all_of(store, False) == [sent[kept.index(True)]]
    assert ratings.own(store, "r0001", False) == {7} and ratings.own(store, "r0001", True) == set()


def test_of_two_raters_the_earlier_counts_and_of_inattentive_ones_none(tmp_path: Path) -> None:
    of = made(tmp_path)

    def answers(rater: str, wrong: int, count: int) -> list[Rating]:
        found = []
        for number in range(count):
            wanted = of.check(rater, number).check
            right: str | int = "indifferent" if isinstance(wanted, str) else 3
            found.append(rating(rater, number, right if number < wrong else wanted or "", check=True))
        return found

    checks = [*answers("r0001", 0, 4), *answers("r0002", 1, 4), *answers("r0003", 2, 4), *answers("r0004", 1, 1)]
    assert inattentive(of, checks) == {"r0003", "r0004"}, "more than a quarter of their checks"
    sent = [rating("r0003", 1, at=1), rating("r0002", 1, at=3), rating("r0001", 1, at=2), rating("r0005", 0, at=9)]
    assert counted(of, sent, checks) == [sent[3], sent[2]]
    store = Store(str(tmp_path / "run"))
    for one in [*sent, *checks, rating("r0004", 9)]:
        ratings.put(store, one)
    assert set(Progress(of, store).taken().nonzero()[0]) == {0, 1}, "slots of inattentive raters are open again"


def test_what_tabs_send_beyond_a_quota_at_one_moment_does_not_count(tmp_path: Path) -> None:
    of = replace(made(tmp_path), per_rater=3)
    slots = [number for number in range(of.slots) if number % of.ratings == 0]  # of different pairs
    sent = [rating("r0001", slot, at=place) for place, slot in enumerate(slots[:5])]
    assert counted(of, reversed(sent), []) == sent[:3]
    same = [rating("r0002", slot, at=slot) for slot in range(of.ratings)]  # of one pair
    assert counted(of, same, []) == same[: min(of.limit, 3)]


def test_progress_sees_what_others_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, store = made(tmp_path), Store(str(tmp_path / "run"))
    monkeypatch.setattr(ratings, "LOOK_SECONDS", 0.0)
    here, there = Progress(of, store), Progress(of, store)
    assert not here.taken().any()
    ratings.put(store, rating("r0001", 3))
    here._next_look = 0.0
    assert here.taken().sum() == 1 and there.taken().sum() == 1
    assert replace(rating("r0001", 3), check=True).path == "checks/r0001/00000003.json"


def test_a_study_is_not_done_before_every_slot_has_a_rating_that_counts(tmp_path: Path) -> None:
    """What is beyond a quota does not count, so its slot is open."""
    of, store = replace(made(tmp_path), per_rater=3), Store(str(tmp_path / "run"))
    slots = [number for number in range(of.slots) if number % of.ratings == 0]
    sent = [rating("r0001", slot, at=-place) for place, slot in enumerate(slots[:5])]  # the last came first
    progress = Progress(of, store)
    for number, one in enumerate(sent, 1):
        ratings.put(store, one)
        progress._next_look = 0.0
        counting = {one.number for one in counted(of, sent[:number], [])}
        assert set(progress.taken().nonzero()[0]) == counting and len(counting) == min(number, 3)
