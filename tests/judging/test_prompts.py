"""Prompts, their questions and how answers are counted."""

import json
from pathlib import Path

import pytest

from rayproj.errors import UserError
from rayproj.judging.prompts import (
    Question,
    QuestionKind,
    categories,
    questions_of,
    read_questions,
    right,
    score,
    singular,
)


def test_plain_rules_ask_for_things_numbers_and_colours() -> None:
    found = questions_of("Three red cherries and a blue whale")
    assert [(q.kind, q.about, q.answer, q.needs) for q in found] == [
        (QuestionKind.object, "cherry", "yes", None),
        (QuestionKind.count, "cherry", "3", 0),
        (QuestionKind.colour, "cherry", "red", 0),
        (QuestionKind.object, ["blue", "whale"][1], "yes", None),
        (QuestionKind.colour, "whale", "blue", 3),
    ]
    assert [q.about for q in questions_of("house with a garden")] == ["house", "garden"]
    assert [(q.kind, q.about) for q in questions_of("an orange")] == [(QuestionKind.object, "orange")]
    assert [q.about for q in questions_of("a black and white cat and an orange and white dog")] == [
        "cat",
        "cat",
        "dog",
        "dog",
    ]
    assert [q.about for q in questions_of("two buses and three mice")] == ["bus", "bus", "mouse", "mouse"]


@pytest.mark.parametrize(
    "plural, one",
    [
        ("apples", "apple"),
        ("cherries", "cherry"),
        ("boxes", "box"),
        ("benches", "bench"),
        ("glass", "glass"),
        ("houses", "house"),
        ("buses", "bus"),
        ("wolves", "wolf"),
        ("mice", "mouse"),
        ("horses", "horse"),
    ],
)
def test_singular(plural: str, one: str) -> None:
    assert singular(plural) == one


@pytest.mark.parametrize(
    "kind, wanted, said, good",
    [
        (QuestionKind.count, "3", "there are three of them", True),
        (QuestionKind.count, "3", "3", True),
        (QuestionKind.count, "3", "13", False),
        (QuestionKind.count, "3", "many", False),
        (QuestionKind.colour, "red", "It is red.", True),
        (QuestionKind.colour, "red", "coloured", False),
        (QuestionKind.object, "yes", "Yes, there is", True),
        (QuestionKind.object, "yes", "no", False),
    ],
)
def test_an_answer_is_right(kind: QuestionKind, wanted: str, said: str, good: bool) -> None:
    assert right(Question("?", wanted, kind), said) is good


def test_what_hangs_on_a_wrong_answer_is_wrong_too() -> None:
    asked = [
        Question("a?", "yes", QuestionKind.object),
        Question("b?", "red", QuestionKind.colour, needs=0),
        Question("c?", "yes", QuestionKind.object),
    ]
    assert score(asked, {0: "yes", 1: "red", 2: "no"}) == pytest.approx(2 / 3)
    assert score(asked, {0: "no", 1: "red", 2: "yes"}) == pytest.approx(1 / 3)


def test_prompts_of_a_file_have_categories(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,category\na  dog,animal\npizza,food\n\n"sky, blue",\n')
    assert categories(str(file)) == {"a dog": "animal", "pizza": "food", "sky, blue": ""}
    file.write_text("prompt,category\na dog,animal\na dog,food\n")
    with pytest.raises(UserError, match="'a dog' in two categories"):
        categories(str(file))
    file.write_text("a dog\n")
    with pytest.raises(UserError, match="first line is to name prompt"):
        categories(str(file))
    with pytest.raises(UserError, match=r"judge\.prompts=.*cannot be read"):
        categories(str(tmp_path / "none"))


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    asked = [
        {"text": "Is there a dog?", "answer": "yes"},
        {"text": "What colour?", "answer": "red", "kind": "colour", "needs": 0},
    ]
    file.write_text(json.dumps({"prompt": "red dog", "questions": asked}) + "\n")
    found = read_questions(str(file))["red dog"]
    assert [q.needs for q in found] == [None, 0] and found[1].kind is QuestionKind.colour
    file.write_text(json.dumps({"prompt": "red dog", "questions": [{"text": "?", "answer": "yes", "needs": 0}]}))
    with pytest.raises(UserError, match="needs a question before it"):
        read_questions(str(file))
    file.write_text("{}")
    with pytest.raises(UserError, match="line 1, is no prompt with questions"):
        read_questions(str(file))
