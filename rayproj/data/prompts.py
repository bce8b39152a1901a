"""Files of prompts: plain text with one a line, or .csv with a column "prompt" and perhaps what is said of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec

from rayproj.errors import UserError

COLUMNS = ("prompt", "category", "object", "number")
MOST = 999  # that somebody can be asked to count


@dataclass(frozen=True)
class Prompt:
    """What is to be drawn.

    Attributes:
        object, number: what is to be counted in an image of it, and how many there should be.
    """

    text: str
    category: str = ""
    object: str = ""
    number: int | None = None


def read_prompts(file: str, option: str) -> list[Prompt]:
    """The prompts of a file, in their order; one may be there more than once.

    Args:
        option: the name under which the file was configured, for messages.

    Raises:
        UserError: the file cannot be read, has no prompt, an unknown column or a wrong number.
    """
    what = f"{option}='{file}'"
    try:
        with fsspec.open(file, "rt", encoding="utf-8-sig") as opened:
            text = opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read ({error}).") from error
    rows = _of_csv(text, what) if file.endswith(".csv") else [Prompt(_plain(line)) for line in text.splitlines()]
    if not (found := [prompt for prompt in rows if prompt.text]):
        raise UserError(f"{what} has no line with a prompt.")
    return found


def _of_csv(text: str, what: str) -> list[Prompt]:
    rows = csv.DictReader(io.StringIO(text))
    names = list(rows.fieldnames or [])
    if "prompt" not in names or not {*names} <= {*COLUMNS}:
        raise UserError(f"{what} has the columns {names}; its first line is to name prompt and any of {COLUMNS[1:]}.")
    found = []
    for row in _lines(rows, what):
        if None in row:
            raise UserError(
                f"{what}, line {rows.line_num}, has more cells than columns; put a prompt with commas in quotes."
            )
        number = (row.get("number") or "").strip()
        if number and (not number.isascii() or not number.isdigit() or int(number) > MOST):
            raise UserError(f"{what}, line {rows.line_num}: '{number}' is no number from 0 to {MOST}.")
        prompt, category, counted = (_plain(row.get(column) or "") for column in COLUMNS[:3])
        found.append(Prompt(prompt, category, counted, int(number) if number else None))
    return found


def _lines(rows: csv.DictReader[str], what: str) -> Iterator[dict[str, str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise UserError(
            f"{what}, line {rows.line_num}, is no line of a .csv file ({error}); is a quote left open?"
        ) from error


def _plain(text: str) -> str:
    return " ".join(text.split())
