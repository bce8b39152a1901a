"""What people said of the models: the ratings of a study, and the order of each pair."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import fsspec
from pyarrow import parquet

from rayproj.errors import UserError
from rayproj.judging import paired
from rayproj.judging.scoring import JudgeConfig
from rayproj.preferences.results import Row, summary, together
from rayproj.storage.store import Store

Won = dict[tuple[str, str], list[int]]
"""By pair, how often the first won and lost."""


def asked(config: JudgeConfig) -> tuple[dict[str, Any] | None, dict[tuple[str, str], paired.Order]]:
    """All that a study found, None without one, and how people ordered the pairs of the models, as these stand in the
    config.

    Raises:
        UserError: it cannot be read, or has no rating that counts of two of the models.
    """
    if not config.human:
        return None, {}
    try:
        rows = _rows(config.human)
        found = None if rows is None else summary(rows)
        won = _counts(config.human) if rows is None else _won(rows, config.question)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"judge.human='{config.human}' is neither the run of a study, nor what 'rayproj study export' writes, nor lines "
            f'of {{"first", "second", "wins", "losses"}} ({str(error).splitlines()[0]}).'
        ) from error
    orders = _orders(won, list(config.models))
    if not orders:
        raise UserError(
            f"judge.human='{config.human}' has no rating of two of these models: {', '.join(config.models)}; name them as "
            f"there, and in judge.question one that was asked there, not '{config.question}'."
        )
    return found, orders


def _rows(human: str) -> list[Row] | None:
    """Of a study; None of a file that has counts alone."""
    if Store(human).exists("study.json"):
        return together([human])
    if not human.endswith(".parquet"):
        return None
    with fsspec.open(human, "rb") as file:
        return list(parquet.read_table(file).to_pylist())


def _won(rows: Sequence[Row], question: str) -> Won:
    """By the ratings of one question that count."""
    found: Won = defaultdict(lambda: [0, 0])
    for row in rows:
        if row["counts"] and row["question"] == question and row["score"] != 0.5:
            found[row["first"], row["second"]][0 if row["score"] == 1 else 1] += 1
    return found


def _counts(file: str) -> Won:
    with fsspec.open(file, "rt", encoding="utf-8") as opened:
        rows = [json.loads(line) for line in opened if line.strip()]
    found: Won = defaultdict(lambda: [0, 0])
    for row in rows:
        _add(found, row["first"], row["second"], int(row["wins"]), int(row["losses"]))
    return found


def _orders(won: Won, models: list[str]) -> dict[tuple[str, str], paired.Order]:
    found: Won = defaultdict(lambda: [0, 0])
    for (a, b), (wins, losses) in won.items():
        if {a, b} <= {*models}:  # a pair that is there the other way round too is one pair
            forward = models.index(a) < models.index(b)
            _add(found, *((a, b, wins, losses) if forward else (b, a, losses, wins)))
    return {pair: paired.human_order(wins, losses) for pair, (wins, losses) in found.items()}


def _add(won: Won, first: str, second: str, wins: int, losses: int) -> None:
    won[first, second][0] += wins
    won[first, second][1] += losses
