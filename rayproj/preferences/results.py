"""What a study found: its ratings as a table, and that table as numbers for a report."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rayproj.errors import UserError
from rayproj.evaluation.proportions import over_clusters
from rayproj.preferences import analysis
from rayproj.preferences.analysis import Games
from rayproj.preferences.plan import INDIFFERENT, LEFT, RIGHT, Question, open_plan
from rayproj.preferences.ratings import all_of, counted, passed
from rayproj.storage.store import Store

LEVEL = 0.99
Row = dict[str, Any]


def rows_of(store: Store) -> list[Row]:
    """Every rating of a study as a row, by slot and time.

    Columns: "first" is the earlier name of the two models and "score" is its own, whichever side it was on; "counts" is
    whether the rating has a part in the results. Of counted objects "first" is the model, "second" is "", and the score is
    whether the number is right.
    """
    plan = open_plan(store)
    ratings, checks = all_of(store, False), all_of(store, True)
    counts = {id(rating) for rating in counted(plan, ratings, checks)}
    attention = passed(plan, checks)
    found = []
    for rating in sorted(ratings, key=lambda r: (r.number, r.at)):
        task = plan.task(rating.number)
        right_checks, all_checks = attention.get(rating.rater, (0, 0))
        row = {
            "rater": rating.rater, "slot": rating.number, "set": task.comparison.set, "question": task.question.name,
            "prompt": task.prompt.text, "category": task.prompt.category, "answer": str(rating.answer),
            "seconds": rating.seconds, "at": rating.at, "counts": id(rating) in counts,
            "checks_passed": right_checks, "checks_answered": all_checks,
        }  # fmt: skip
        if task.question is Question.count:
            row |= {"left": task.models[0], "right": "", "first": task.models[0], "second": ""}
            row |= {"number": int(rating.answer), "wanted": task.prompt.number}
            row["score"] = float(row["number"] == row["wanted"])
        else:
            row |= {"left": task.models[0], "right": task.models[1], "number": None, "wanted": None}
            row["first"], row["second"] = sorted(task.models)
            side = LEFT if row["first"] == row["left"] else RIGHT
            row["score"] = 0.5 if rating.answer == INDIFFERENT else float(rating.answer == side)
        found.append(row)
    return found


def parquet(rows: Sequence[Row]) -> bytes:
    """The rows as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ("rater", "set", "question", "prompt", "category", "left", "right", "first", "second", "answer")
    whole = ("slot", "number", "wanted", "checks_passed", "checks_answered")
    columns = [
        *((name, pa.string()) for name in texts),
        *((name, pa.int64()) for name in whole),
        *((name, pa.float64()) for name in ("score", "seconds", "at")),
        ("counts", pa.bool_()),
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(columns)), buffer)
    return buffer.getvalue()


def together(uris: Sequence[str]) -> list[Row]:
    """The ratings of several studies, such as one and that of a model added later; a rater is of one study.

    Raises:
        UserError: a study is not there, or two call different images by one name.
    """
    of: dict[str, tuple[str, str]] = {}
    for uri in uris:
        for name, images in open_plan(Store(uri)).models.items():
            other, theirs = of.setdefault(name, (uri, images))
            if images != theirs:
                raise UserError(
                    f"The studies '{other}' and '{uri}' each call other images '{name}', so that their ratings do not say "
                    "the same; report them apart, or name the models of one differently."
                )
    several = len(uris) > 1
    return [
        {**row, "rater": f"{number}/{row['rater']}" if several else row["rater"]}
        for number, uri in enumerate(uris)
        for row in rows_of(Store(uri))
    ]


def summary(rows: Sequence[Row], replicates: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What the ratings that count say, by prompt set and question, for JSON.

    Raises:
        UserError: there is none.
    """
    used = [row for row in rows if row["counts"]]
    if not used:
        raise UserError("There is no rating yet that counts; the report needs some.")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in used:
        groups[row["set"], row["question"]].append(row)
    order = [question.name for question in Question]
    named = sorted(groups, key=lambda key: (key[0], order.index(key[1])))
    out = {row["rater"] for row in rows} - {row["rater"] for row in used}
    return {
        "level": LEVEL,
        "replicates": replicates,
        "ratings": len(used),
        "raters": len({row["rater"] for row in used}),
        "left_out": {"ratings": len(rows) - len(used), "raters": len(out)},
        "results": [
            {"set": key[0], "question": key[1]} | _result(groups[key], key[1], replicates, seed) for key in named
        ],
    }


def _result(rows: list[Row], question: str, replicates: int, seed: int) -> dict[str, Any]:
    counting = question == Question.count.name
    found: dict[str, Any] = dict(_numbers(rows))
    units: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        units[row["prompt"], row["first"], row["second"]].append(row["number"] if counting else row["score"])
    repeated = sum(len(values) > 1 for values in units.values())
    # Both orders of a pair, so that chance does not depend on which model has the earlier name.
    mirrored = [] if counting else [[1 - value for value in values] for values in units.values()]
    alpha = analysis.krippendorff([*units.values(), *mirrored], nominal=counting)
    found["agreement"] = {"alpha": None if np.isnan(alpha) else alpha, "images": repeated}
    of: Callable[[list[Row]], dict[str, Any] | None]
    if counting:
        of = _accuracy
    else:
        chosen = [row for row in rows if row["answer"] != INDIFFERENT]
        found["left"] = _share(chosen, "rater", [row["answer"] == LEFT for row in chosen])
        found["indifferent"] = 1 - len(chosen) / len(rows)
        found |= _matrices(rows)

        def of(some: list[Row]) -> dict[str, Any] | None:
            return _strengths(some, replicates, seed)

    found["models"] = of(rows)
    by: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by[row["category"]].append(row)
    found["categories"] = (
        {name: {**_numbers(some), "models": of(some)} for name, some in sorted(by.items())} if len(by) > 1 else {}
    )
    return found


def _numbers(rows: list[Row]) -> dict[str, int]:
    return {"ratings": len(rows), "raters": len({row["rater"] for row in rows})}


def games_of(rows: Sequence[Row]) -> Games:
    """Side-by-side ratings as comparisons of the models that they name."""
    models = sorted({row[side] for row in rows for side in ("first", "second")})
    raters = sorted({row["rater"] for row in rows})
    number, who = {name: i for i, name in enumerate(models)}, {name: i for i, name in enumerate(raters)}
    first, second = (np.array([number[row[side]] for row in rows], np.int64) for side in ("first", "second"))
    score = np.array([row["score"] for row in rows], np.float64)
    return Games(tuple(models), first, second, score, np.array([who[row["rater"]] for row in rows], np.int64))


def _strengths(rows: list[Row], replicates: int, seed: int) -> dict[str, Any] | None:
    """Elo of each model with its interval, which few raters have none of, the best first; None where not all models met."""
    games = games_of(rows)
    wins = games.wins()
    if not analysis.connected(wins):
        return None
    value = analysis.elo(analysis.bradley_terry(wins))
    ends = np.stack(analysis.bootstrap(games, LEVEL, replicates, seed), 1)
    low, high = zip(*([None, None] if np.isnan(pair).any() else pair for pair in ends.tolist()), strict=True)
    apart = analysis.elo(analysis.davidson(wins, games.ties())[0])
    return {
        games.models[i]: {
            "elo": float(value[i]), "low": low[i], "high": high[i], "ties_modelled": float(apart[i]),
            "ratings": float(wins[i].sum() + wins[:, i].sum()),
        }
        for i in np.argsort(-value)
    }  # fmt: skip


def _matrices(rows: list[Row]) -> dict[str, Any]:
    """Win rates and numbers of comparisons, row against column."""
    games = games_of(rows)
    wins = games.wins()
    rates, met = analysis.win_rates(wins), wins + wins.T
    pairs = [(i, j) for i in range(len(wins)) for j in range(len(wins)) if met[i, j]]
    return {
        "win_rates": _nested((games.models[i], games.models[j], float(rates[i, j])) for i, j in pairs),
        "met": _nested((games.models[i], games.models[j], float(met[i, j])) for i, j in pairs),
    }


def _nested(entries: Any) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row, column, value in entries:
        found[row][column] = value
    return dict(found)


def _accuracy(rows: list[Row]) -> dict[str, Any]:
    """Share of the ratings of each model's images that count as many objects as were asked for, over prompts; the best
    first."""
    by: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by[row["first"]].append(row)
    found = {
        name: {**_share(of, "prompt", [row["score"] for row in of]), "images": len({row["prompt"] for row in of})}
        for name, of in by.items()
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1]["value"], item[0])))


def _share(rows: list[Row], cluster: str, hits: Sequence[float]) -> dict[str, Any]:
    """A share of ratings, with its interval over raters or prompts."""
    names, number = np.unique([row[cluster] for row in rows], return_inverse=True)
    right, of = (np.bincount(number, weights, len(names)) for weights in (hits, None))
    low, high = over_clusters(right, of, LEVEL) or (None, None)
    return {"of": len(rows), "value": float(np.mean(hits)) if rows else None, "low": low, "high": high}


def pairs_to_add(uris: Sequence[str], model: str) -> list[list[str]]:
    """Pairs that a new model is to play next: those of `analysis.opponents` for any of the questions and prompt sets, whose
    strengths may differ; [] when it has met all whom it should.

    Raises:
        UserError: there are no ratings of pairs.
    """
    rows = [row for row in together(uris) if row["counts"] and row["second"]]
    if not rows:
        raise UserError("There is no rating of a pair yet; a new model is placed among models that were compared.")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["question"]].append(row)
    wanted: set[str] = set()
    for some in groups.values():
        games = games_of(some)
        wins = games.wins()
        if not analysis.connected(wins):
            raise UserError(
                "The models of these studies never met each other, by whatever way; compare some of them first."
            )
        ratings = dict(zip(games.models, analysis.elo(analysis.bradley_terry(wins)).tolist(), strict=True))
        met = {row["first"] for row in some if row["second"] == model} | {
            row["second"] for row in some if row["first"] == model
        }
        wanted |= set(analysis.opponents(ratings, model)) - met
    return [[model, name] for name in sorted(wanted)]
