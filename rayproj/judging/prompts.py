"""Sets of prompts in categories, and the questions by which an image of a prompt is judged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import fsspec

from rayproj.data.prompts import read_prompts
from rayproj.errors import UserError

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOURS = ("black", "blue", "brown", "grey", "green", "orange", "pink", "purple", "red", "white", "yellow")
# Plurals of what is drawn that no ending tells.
IRREGULAR = {
    "buses": "bus", "calves": "calf", "children": "child", "elves": "elf", "feet": "foot", "geese": "goose",
    "halves": "half", "leaves": "leaf", "loaves": "loaf", "men": "man", "mice": "mouse", "octopuses": "octopus",
    "people": "person", "potatoes": "potato", "scarves": "scarf", "sheep": "sheep", "shelves": "shelf", "teeth": "tooth",
    "thieves": "thief", "tomatoes": "tomato", "walruses": "walrus", "wolves": "wolf", "women": "woman",
}  # fmt: skip
BETWEEN = re.compile(r"\s*(?:,|\b(?:and|with|next to|beside|on|in|under|behind|of)\b)\s*")


class QuestionKind(Enum):
    """What a question is about."""

    object = "object"
    colour = "colour"
    count = "count"
    other = "other"


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        about: the thing asked after.
        needs: number of the question without whose right answer this one counts as wrong, as in DSG (Cho et al. 2024, arXiv
            2310.18235, section 3): the colour of what is not there is no colour.
    """

    text: str
    answer: str
    kind: QuestionKind
    about: str = ""
    needs: int | None = None


def categories(file: str, option: str = "judge.prompts") -> dict[str, str]:
    """Prompt -> category, of a file of prompts.

    Raises:
        UserError: the file cannot be read, is empty, or has a prompt in two categories.
    """
    found: dict[str, str] = {}
    for prompt in read_prompts(file, option):
        if found.setdefault(prompt.text, prompt.category) != prompt.category:
            raise UserError(f"{option}='{file}' has '{prompt.text}' in two categories; leave one out.")
    return found


def read_questions(file: str) -> dict[str, list[Question]]:
    """Prompt -> questions, of lines of JSON: {"prompt": …, "questions": [{"text", "answer", "kind", "about", "needs"}]}.

    Raises:
        UserError: the file cannot be read, or a line is something else.
    """
    found: dict[str, list[Question]] = {}
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
            asked = [
                Question(
                    q["text"],
                    str(q["answer"]),
                    QuestionKind(q.get("kind", "other")),
                    q.get("about", ""),
                    q.get("needs"),
                )
                for q in row["questions"]
            ]
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"judge.alignment.questions='{file}', line {number}, is no prompt with questions ({error})."
            ) from error
        if wrong := [q for k, q in enumerate(asked) if q.needs is not None and not 0 <= q.needs < k]:
            raise UserError(
                f"judge.alignment.questions='{file}', line {number}: '{wrong[0].text}' needs a question before it."
            )
        found[prompt] = asked
    return found


def questions_of(prompt: str) -> list[Question]:
    """The questions that plain rules find in a prompt: of each of its things whether it is there, then its number and
    colour where the prompt says them. A language model finds more; give its questions in a file (`read_questions`)."""
    asked: list[Question] = []
    parts = BETWEEN.split(prompt.lower())
    for place, part in enumerate(parts):
        words = [word for word in re.findall(r"[\w'’-]+", part) if word not in ("a", "an", "the")]
        count = next((NUMBERS.index(w) for w in words if w in NUMBERS), None)
        colour = next((w for w in words if w in COLOURS), None)
        rest = [w for w in words if w not in COLOURS and w not in NUMBERS]
        if (
            not rest and colour == "orange" and place == len(parts) - 1
        ):  # the one that is a thing, not "orange and white"
            rest, colour = [colour], None
        if not rest:
            continue
        thing = " ".join([*rest[:-1], singular(rest[-1]) if count not in (None, 1) else rest[-1]])
        there = len(asked)
        asked.append(Question(f"Is there a {thing} in the picture?", "yes", QuestionKind.object, thing))
        if count is not None:
            asked.append(
                Question(f"How many of these are there: {thing}?", str(count), QuestionKind.count, thing, there)
            )
        if colour:
            asked.append(Question(f"What colour is the {thing}?", colour, QuestionKind.colour, thing, there))
    return asked


def singular(word: str) -> str:
    """Of a plural: apples, cherries, boxes, wolves, mice."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, other in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
            return word.removesuffix(ending) + other
    return word


def right(question: Question, answer: str) -> bool:
    """Whether an answer is the right one: numbers by value, in digits or words; else one of its words or all of it."""
    words = re.findall(r"[\w'-]+", answer.lower())
    if question.kind is QuestionKind.count:
        values = [int(w) if w.isdigit() else NUMBERS.index(w) for w in words if w.isdigit() or w in NUMBERS]
        return values[:1] == [int(question.answer)]
    return question.answer.lower() in words or answer.strip().lower() == question.answer.lower()


def score(questions: list[Question], answers: Mapping[int, str]) -> float:
    """The share of questions that are answered rightly, in [0, 1], counting one as wrong whose needed one is; NaN of
    none."""
    good: list[bool] = []
    for number, question in enumerate(questions):
        met = question.needs is None or good[question.needs]
        good.append(met and right(question, answers[number]))
    return sum(good) / len(good) if good else float("nan")


def _lines(file: str) -> list[str]:
    what = f"judge.alignment.questions='{file}'"
    try:
        with fsspec.open(file, "rt", encoding="utf-8") as opened:
            found = [line.strip("\n") for line in opened if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read ({error}).") from error
    if not found:
        raise UserError(f"{what} has no line.")
    return found
