"""The plan of a study against its promises, by playing studies through."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from rayproj import config as configuration
from rayproj.errors import UserError
from rayproj.preferences.plan import Plan, Question, Turn
from rayproj.preferences.study import SetConfig, prompts_of
from tests.support.studies import made, study


def played(of: Plan, raters: int) -> dict[str, list[Turn]]:
    """What raters do who take turns until there is nothing left for any of them."""
    taken, done = np.zeros(of.slots, bool), {f"r{i:04d}": list[Turn]() for i in range(raters)}
    waiting = list(done)
    while waiting:
        for rater in list(waiting):
            own = [turn.number for turn in done[rater] if not turn.check]
            checks = [turn.number for turn in done[rater] if turn.check]
            turn = of.next(rater, own, checks, taken)
            assert turn == of.next(rater, set(own), set(checks), taken), "a reload shows the same"
            if turn is None:
                waiting.remove(rater)
                continue
            done[rater].append(turn)
            if not turn.check:
                assert not taken[turn.number] and of.allows(own, turn.number)
                taken[turn.number] = True
    return done


def test_all_pairs_meet_on_every_question_and_prompts_are_spread_evenly(tmp_path: Path) -> None:
    of = made(tmp_path)
    pairs = {("a", "b"), ("a", "c"), ("b", "c")}
    found = defaultdict(set)
    for comparison in of.comparisons:
        found[comparison.set, comparison.question].add(comparison.models)
    assert found == {
        ("p", Question.overall): pairs, ("p", Question.appeal): pairs, ("q", Question.alignment): pairs,
        ("p", Question.count): {("a",), ("b",), ("c",)},
    }  # fmt: skip
    for number, comparison in enumerate(of.comparisons):
        counts = Counter(of.prompt_of(slot) for slot in range(number * of.ratings, (number + 1) * of.ratings))
        prompts = len(of.sets[comparison.set])
        assert len(counts) == prompts and max(counts.values()) - min(counts.values()) <= 1


def test_sides_are_shuffled_for_every_rating_and_depend_on_nothing_else(tmp_path: Path) -> None:
    of = made(tmp_path, ratings=2500)
    tasks = [of.task(slot) for slot in range(of.slots) if of.task(slot).question is Question.overall]
    first = np.array([task.models == task.comparison.models for task in tasks])
    by_prompt = defaultdict(list)
    for task, value in zip(tasks, first, strict=True):
        by_prompt[task.comparison.models, task.prompt.text].append(value)
    spread = 4.5 * 0.5  # standard deviations of a coin
    assert abs(first.mean() - 0.5) < spread / len(first) ** 0.5
    assert all(abs(np.mean(v) - 0.5) < spread / len(v) ** 0.5 for v in by_prompt.values())
    assert [made(tmp_path, seed=0, ratings=2500).task(s) for s in range(9)] == [of.task(s) for s in range(9)]
    assert any(made(tmp_path, seed=1, ratings=2500).task(s) != of.task(s) for s in range(9))


def test_a_study_that_is_played_keeps_every_quota_and_fills_every_slot_once(tmp_path: Path) -> None:
    of = made(tmp_path)
    done = played(of, raters=12)
    rated = [turn.number for turns in done.values() for turn in turns if not turn.check]
    assert sorted(rated) == list(range(of.slots)), "every slot once"
    for turns in done.values():
        own = [turn.number for turn in turns if not turn.check]
        assert len(own) <= of.per_rater == 60 and of.limit == 5
        assert max(Counter(slot // of.ratings for slot in own).values()) <= 5
        shown = [(slot // of.ratings, of.prompt_of(slot)) for slot in own]
        assert len(set(shown)) == len(shown), "the same two images on the same question once"
        assert [t.number for t in turns if t.check] == list(range(sum(t.check for t in turns)))
        whole = len(own) // of.block  # an attention check in every whole block
        assert whole <= sum(turn.check for turn in turns) <= whole + 1
    first = [[turn.number for turn in turns if not turn.check][: of.block] for turns in done.values()]
    kinds = [len({of.task(slot).question for slot in slots}) for slots in first]
    assert kinds.count(1) >= 10, "one question in a row, while there are slots for it"


def test_few_raters_stop_at_their_quota_with_their_ratings_spread(tmp_path: Path) -> None:
    of = made(tmp_path, per_rater=30)
    done = played(of, raters=2)
    rated = [turn.number for turns in done.values() for turn in turns if not turn.check]
    assert len(rated) == len(set(rated)) == 60
    for number in range(len(of.comparisons)):
        counts = Counter(of.prompt_of(slot) for slot in rated if slot // of.ratings == number)
        assert max(counts.values(), default=0) <= 2, "no prompt is far ahead of others"


def test_two_who_begin_at_once_hardly_ever_get_the_same(tmp_path: Path) -> None:
    of = made(tmp_path, ratings=500, block=0)
    turns = [of.next(f"r{i:04d}", [], [], np.zeros(of.slots, bool)) for i in range(40)]
    assert len({turn.number for turn in turns if turn}) >= 25  # 40 draws from 72 slots whose prompt has no rating yet


def test_attention_checks_ask_for_each_side_and_for_numbers_and_are_a_raters_own(tmp_path: Path) -> None:
    of = made(tmp_path)
    checks = [of.check(f"r{i:04d}", n) for i in range(30) for n in range(10)]
    paired = Counter(c.check for c in checks if c.question is not Question.count)
    assert set(paired) == {"left", "right"} and min(paired.values()) > 0.35 * sum(paired.values())
    numbers = {c.check for c in checks if c.question is Question.count}
    assert numbers == set(range(11, 21)), "more than any image of ten objects shows"
    assert checks[0] == of.check("r0000", 0) and all(of.task(s).check is None for s in range(of.slots))


def test_kept_as_json_it_is_the_same(tmp_path: Path) -> None:
    of = made(tmp_path)
    assert Plan.from_dict(json.loads(json.dumps(of.to_dict()))) == of


def test_only_the_pairs_of_a_new_model(tmp_path: Path) -> None:
    of = made(tmp_path, pairs=[["c", "a"]])
    assert {c.models for c in of.comparisons} == {("c", "a"), ("a",), ("c",)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": {"a": "x"}}, "needs two models"),
        ({"pairs": [["a", "z"]]}, "no pair of two"),
        ({"pairs": [["a", "b"], ["b", "a"]]}, "named twice"),
        ({"ratings": 0}, "must be positive"),
        ({"share": 0.0}, "are shares"),
        ({"size": [16]}, "[height, width]"),
        ({"sets": {}}, "must both name something"),
    ],
)
def test_what_is_wrong_with_a_config(tmp_path: Path, changes: dict, says: str) -> None:
    assert not study(tmp_path).problems()
    assert any(says in problem for problem in study(tmp_path, **changes).problems())


def test_references_go_with_the_question_about_them() -> None:
    assert SetConfig("x", [Question.detailed]).problems() and SetConfig("x", references="y").problems()
    assert not SetConfig("x", [Question.detailed], "y").problems()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "text\nhorse\n", "first line is to name prompt"),
        ("a.csv", "prompt,colour\nhorse,red\n", "first line is to name prompt"),
        ("a.csv", "prompt,object,number\nhorse,legs,-1\n", "no number from 0"),
        ("a.csv", "prompt,object,number\nhorse,legs,\n", "do not say what is to be counted"),
        ("a.csv", "prompt\nhorse\nhorse\n", "twice"),
        ("a.txt", "\n\n", "no line with a prompt"),
        ("b/none.txt", "", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / "a").mkdir()
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        prompts_of(SetConfig(str(tmp_path / name), [Question.count]))


def test_the_config_that_ships_is_sound() -> None:
    from rayproj.jobs.serve_study import Config  # type: ignore[attr-defined]

    config = configuration.load(Config, "configs/serve_study.yaml")
    prompts = prompts_of(config.study.sets["emoji"])
    assert len(prompts) == 8 and {p.category for p in prompts} >= {"animals", "faces"}
