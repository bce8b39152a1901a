"""Soups of classifiers in a report: the candidates that matter, and what lies between two members."""

from __future__ import annotations

from itertools import combinations, cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rayproj.report.figures import SERIES, panels

WEIGHTS = "weights"


def rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The members alone, the best candidate by each measure, and the greedy soup: what each is called, and its entry of
    "soups" of `rayproj.robustness.mixing.summary`. A candidate that is several of these is there once."""
    soups, members = found["soups"], found["members"]
    titles: dict[int, list[str]] = {}
    for k, name in enumerate(members):
        alone = next(n for n, one in enumerate(soups) if np.allclose(one[WEIGHTS], np.eye(len(members))[k]))
        titles.setdefault(alone, []).append(name)
    for measure, number in found["best"].items():
        titles.setdefault(number, []).append(f"best {measure}")
    if "greedy" in found:
        titles.setdefault(found["greedy"], []).append("greedy, for the union")
    return [(", ".join(title), soups[number]) for number, title in titles.items()]


def trade_offs(found: dict[str, Any]) -> Figure:
    """A panel for every two members: each accuracy along the line of the soups between them, and beyond."""
    names, soups = found["members"], found["soups"]
    weights = np.array([one[WEIGHTS] for one in soups])
    measures = [name for name in soups[0] if name != WEIGHTS]
    if measures[2:] == ["union"]:  # of a single threat
        measures.pop()
    pairs = list(combinations(range(len(names)), 2))
    figure, axes = panels(max(1, len(pairs)), 3.0, 2.6)
    for axis, (i, j) in zip(axes, pairs, strict=False):
        line = [k for k in np.argsort(weights[:, j], kind="stable") if np.isclose(weights[k, [i, j]].sum(), 1)
                and np.count_nonzero(np.delete(weights[k], [i, j])) == 0]  # fmt: skip
        x = weights[line, j]
        for colour, measure in zip(cycle(SERIES), measures):
            shares = [soups[k][measure] for k in line]
            axis.plot(x, [s["value"] for s in shares], color=colour, marker="o", markersize=3, label=measure)
            axis.fill_between(x, [s["low"] for s in shares], [s["high"] for s in shares], color=colour, alpha=0.1)
        axis.set_ylim(0, 1)
        axis.set_xlabel(f"weight of {names[j]}, the rest {names[i]}")
        axis.set_ylabel("right")
    axes[0].legend(frameon=False, fontsize=7, loc="lower left", ncols=3)
    return figure
