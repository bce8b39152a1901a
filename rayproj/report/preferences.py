"""The page of `jobs/serve_study.py`: which model people prefer, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rayproj.evaluation.proportions import LEAST
from rayproj.preferences.results import parquet, summary, together
from rayproj.report import figures
from rayproj.report.pages import data_uri, rendered
from rayproj.storage.store import Store, to_json

TITLES = {
    "overall": "Overall preference",
    "alignment": "Prompt–image alignment",
    "appeal": "Visual appeal",
    "detailed": "Detailed alignment",
    "count": "Exact number of objects",
}


def intervals(found: dict[str, Any]) -> Figure:
    """A panel for each prompt set and question: every model with its interval, the best on top."""
    results = [result for result in found["results"] if result["models"]]
    models = sorted({model for result in results for model in result["models"]})
    colours = dict(zip(models, cycle(figures.SERIES), strict=False))
    figure, axes = plt.subplots(
        len(results), 1, figsize=(6.4, sum(0.7 + 0.28 * len(r["models"]) for r in results) + 0.2), squeeze=False,
        height_ratios=[0.7 + 0.28 * len(r["models"]) for r in results], layout="constrained",
    )  # fmt: skip
    for axis, result in zip(axes[:, 0], results, strict=True):
        counting = result["question"] == "count"
        for place, (model, row) in enumerate(reversed(result["models"].items())):
            value = row["value"] if counting else row["elo"]
            told = row["low"] is not None  # else a point without an interval
            error = [[max(0.0, value - row["low"])], [max(0.0, row["high"] - value)]] if told else None
            axis.errorbar([value], [place], xerr=error, color=colours[model], marker="o", markersize=5, capsize=3)
        axis.set_yticks(range(len(result["models"])), list(reversed(result["models"])))
        axis.set_ylim(-0.6, len(result["models"]) - 0.4)
        axis.set_title(f"{TITLES[result['question']]}, {result['set']}", fontsize=9)
        axis.set_xlabel("share of ratings with the right number" if counting else "Elo")
    return figure


def picture(found: dict[str, Any]) -> str:
    """`intervals` as an address; "" where no models can be ranked."""
    ranked = any(result["models"] for result in found["results"])
    return data_uri(figures.svg(intervals(found)), "svg+xml") if ranked else ""


def page(found: dict[str, Any]) -> str:
    """HTML that needs no other file.

    Args:
        found: of `rayproj.preferences.results.summary`.
    """
    return rendered("preferences.html", found=found, questions=TITLES, preferred=picture(found), least=LEAST)


def write(runs: Sequence[str], out: str, replicates: int = 1000) -> dict[str, Any]:
    """Write ratings.parquet, preferences.json and preferences.html of studies into a folder.

    Returns:
        Where they are, and the best model by prompt set and question.

    Raises:
        UserError: there is no study, or no rating.
    """
    rows, store = together(runs), Store(out)
    found = summary(rows, replicates)
    store.write("ratings.parquet", parquet(rows))
    store.write("preferences.json", to_json(found))
    store.write("preferences.html", page(found).encode())
    best = {f"{r['set']}/{r['question']}": next(iter(r["models"]), None) for r in found["results"] if r["models"]}
    return {"html": f"{store.uri}/preferences.html", "ratings": found["ratings"], "best": best}
