"""What people said of the models: the ratings of a study, and the order of each pair."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from pyarrow import parquet

from rayproj.errors import UserError
from rayproj.judging import paired
from rayproj.judging.scoring import JudgeConfig
from rayproj.preferences.results import Row, summary, together
from rayproj.storage.store import Store

Won = dict[tuple[str, str], dict[str, list[int]]]
"""By pair and rater, how often the first won and lost; the rater is "" of counts, which do not name any."""


def asked(
    config: JudgeConfig, prompts: Collection[str]
) -> tuple[dict[str, Any] | None, dict[tuple[str, str], paired.Order]]:
    """All that a study found, None without one, and how people ordered the pairs of the models, as these stand in the
    config: by the ratings of a study on the prompts that are judged, over raters; by counts as they are.

    Args:
        prompts: that are judged.

    Raises:
        UserError: it cannot be read, or has no rating that counts of two of the models.
    """
    if not config.human:
        return None, {}
    try:
        rows = _rows(config.human)
        found = None if rows is None else summary(rows)
        won = _counts(config.human) if rows is None else _won(rows, config.question, prompts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"judge.human='{config.human}' is neither the run of a study, nor what 'rayproj study export' writes, nor lines "
            f'of {{"first", "second", "wins", "losses"}} ({str(error).splitlines()[0]}).'
        ) from error
    orders = _orders(won, list(config.models))
    if not orders:
        raise UserError(
            f"judge.human='{config.human}' has no rating of two of these models on their prompts: "
            f"{', '.join(config.models)}; name them as there, and in judge.question one that was asked of these prompts, "
            f"not '{config.question}'."
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


def _won(rows: Sequence[Row], question: str, prompts: Collection[str]) -> Won:
    """By the ratings of one question that count, on these prompts alone: what is held against them saw no others."""
    found, judged = _none(), {" ".join(prompt.split()) for prompt in prompts}
    for row in rows:
        if row["counts"] and row["question"] == question and row["score"] != 0.5 and row["prompt"] in judged:
            found[row["first"], row["second"]][row["rater"]][0 if row["score"] == 1 else 1] += 1
    return found


def _counts(file: str) -> Won:
    with fsspec.open(file, "rt", encoding="utf-8") as opened:
        rows = [json.loads(line) for line in opened if line.strip()]
    found = _none()
    for row in rows:
        _add(found[row["first"], row["second"]][""], int(row["wins"]), int(row["losses"]))
    return found


def _orders(won: Won, models: list[str]) -> dict[tuple[str, str], paired.Order]:
    found = _none()
    for (a, b), by in won.items():
        if {a, b} <= {*models}:  # a pair that is there the other way round too is one pair
            forward = models.index(a) < models.index(b)
            for rater, (wins, losses) in by.items():
                _add(found[(a, b) if forward else (b, a)][rater], *((wins, losses) if forward else (losses, wins)))
    return {pair: _order(by) for pair, by in found.items()}


def _order(by: Mapping[str, list[int]]) -> paired.Order:
    if "" in by:
        return paired.human_order(*by[""])
    wins, losses = np.array(list(by.values()), np.float64).T
    return paired.raters_order(wins, losses)


def _none() -> Won:
    return defaultdict(lambda: defaultdict(lambda: [0, 0]))


def _add(to: list[int], wins: int, losses: int) -> None:
    to[0] += wins
    to[1] += losses
