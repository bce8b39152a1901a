"""Only the owner's tokens are accepted, and ids tell nothing and cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayproj.errors import UserError
from rayproj.preferences.plan import Turn
from rayproj.preferences.tokens import Seal, issue, rater_of
from rayproj.storage.store import Store


def test_tokens_open_their_own_rater_and_only_hashes_are_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tokens = issue(store, 3) + issue(store, 2)
    assert [rater_of(store, token) for token in tokens] == [f"r000{i}" for i in range(1, 6)]
    kept = b"".join(store.read(path) for path in store.list())
    for token in tokens:
        assert token.partition("-")[2].encode() not in kept
    first, second = tokens[:2]
    swapped = first.partition("-")[0] + "-" + second.partition("-")[2]
    for wrong in (
        "",
        "r0001",
        swapped,
        first + "x",
        first[:-1],
        "r9999-" + first[6:],
        "../../secret",
        "r0001-" + "a" * 22,
    ):
        assert rater_of(store, wrong) is None, wrong
    store.delete_tree("raters/r0002.json")
    assert rater_of(store, second) is None and rater_of(store, first) == "r0001"
    assert rater_of(store, issue(store, 1)[0]) == "r0006"


def test_issuing_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="positive"):
        issue(Store(str(tmp_path)), 0)


def test_ids_of_tasks_are_one_raters_and_every_change_is_noticed(tmp_path: Path) -> None:
    seal = Seal.of(Store(str(tmp_path)))
    assert Seal.of(Store(str(tmp_path))).task(Turn(False, 5), "r0001") == seal.task(Turn(False, 5), "r0001")
    for turn in (Turn(False, 5), Turn(True, 5), Turn(False, 187_499)):
        task = seal.task(turn, "r0001")
        assert len(task) == 34 and seal.turn(task, "r0001") == turn
        assert seal.turn(task, "r0002") is None
        for place in range(len(task)):
            other = task[:place] + ("A" if task[place] != "A" else "B") + task[place + 1 :]
            # The last character has bits that stand for nothing.
            assert seal.turn(other, "r0001") is None or place == len(task) - 1
    for wrong in ("", "x", "-" * 34, "A" * 34, "é" * 34, "A" * 400):
        assert seal.turn(wrong, "r0001") is None
    other = Seal.of(Store(str(tmp_path / "other")))
    assert other.turn(seal.task(Turn(False, 5), "r0001"), "r0001") is None
    assert other.image("a", "p") != seal.image("a", "p") != seal.image("b", "p")


@pytest.mark.parametrize("path", ["raters/r0003.json", "ratings/r0003/00000001.json", "checks/r0003/00000000.json"])
def test_nobody_gets_the_number_of_somebody_who_was_there(tmp_path: Path, path: str) -> None:
    """Else the ratings of who was shut out would be those of the next rater."""
    store = Store(str(tmp_path))
    store.write(path, b"{}")
    (token,) = issue(store, 1)
    assert rater_of(store, token) == "r0004"
