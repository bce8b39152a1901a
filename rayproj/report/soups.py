"""Soups of classifiers in a report: the candidates that matter, and what lies between two members."""

from __future__ import annotations

from itertools import combinations, cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rayproj.report.figures import SERIES, panels

WEIGHTS, CLEAN = "weights", "clean"


def rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The members alone, the best candidate by each measure, and the greedy soup: what each is called, and its entry of
    "soups" of `rayproj.robustness.mixing.summary`. A candidate that is several of these is there once. Then those that were
    learned, whose weights by layer are too many for a table, and last the ensemble."""
    soups, members = found["soups"], found["members"]
    titles: dict[int, list[str]] = {}
    for name, alone in zip(members, _alone(found), strict=True):
        titles.setdefault(soups.index(alone), []).append(name)
    for measure, number in found["best"].items():
        titles.setdefault(number, []).append(f"best {measure}")
    if "greedy" in found:
        titles.setdefault(found["greedy"], []).append("greedy, for the union")
    learned = [
        (title, {key: value for key, value in one.items() if not isinstance(value, dict) or key != WEIGHTS})
        for title, one in _learned(found).items()
    ]
    together = [(f"ensemble, {len(members)} passes", found["ensemble"])] if "ensemble" in found else []
    return [(", ".join(title), soups[number]) for number, title in titles.items()] + learned + together


def _learned(found: dict[str, Any]) -> dict[str, Any]:
    return {f"learned, {how.replace('_', ' ')}": one for how, one in found.get("learned", {}).items()}


def trade_offs(found: dict[str, Any]) -> Figure:
    """A panel for every threat and the union: accuracy under it over accuracy without an attack, of all candidates, with the
    members, what was learned, the ensemble and the front of what no candidate beats in both."""
    soups, members = found["soups"], found["members"]
    measures = [name for name in _measures(found) if name != CLEAN]
    marked = dict(zip(members, _alone(found), strict=True)) | _learned(found)
    if "ensemble" in found:
        marked["ensemble"] = found["ensemble"]
    figure, axes = panels(max(1, len(measures)), 3.0, 2.8)
    for axis, measure in zip(axes, measures, strict=False):
        points = np.array([[one[name]["value"] for name in (CLEAN, measure)] for one in soups])
        axis.scatter(*points.T, s=8, color="0.75", zorder=1)
        best = points[front(points)]
        axis.plot(*best.T, color="0.5", linewidth=1, zorder=2)
        for colour, (name, one) in zip(cycle(SERIES), marked.items()):
            ends = [[abs(one[m]["value"] - one[m][end]) for end in ("low", "high")] for m in (CLEAN, measure)]
            at = [one[m]["value"] for m in (CLEAN, measure)]
            marker = "o" if name in members else "*" if name == "ensemble" else "D"
            axis.errorbar(*at, xerr=np.c_[ends[0]], yerr=np.c_[ends[1]], color=colour, marker=marker, markersize=6,
                          elinewidth=0.6, linestyle="none", label=name, zorder=3)  # fmt: skip
        axis.set_xlabel("right without an attack")
        axis.set_ylabel(f"right under {measure}" if measure != "union" else "right under all")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def compared(found: dict[str, dict[str, Any]]) -> Figure:
    """A panel for every threat of all of several sets of soups: accuracy under it over accuracy without an attack, of two
    members as a line from one to the other, of more as their places."""
    measures = shared(found)
    figure, axes = panels(max(1, len(measures)), 3.6, 3.2)
    for axis, measure in zip(axes, measures, strict=False):
        colours = cycle(SERIES)
        for name, one in found.items():
            if len(one["members"]) == 2:
                line = sorted(one["soups"], key=lambda soup: soup[WEIGHTS][1])
                axis.plot(*_places(line, measure), color=next(colours), marker="o", markersize=3, label=name)
            else:
                for member, soup in zip(one["members"], _alone(one), strict=True):
                    axis.plot(
                        *_places([soup], measure), color=next(colours), marker="s", linestyle="none", label=member
                    )
        axis.set_xlabel("right without an attack")
        axis.set_ylabel(f"right under {measure}")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def shared(found: dict[str, dict[str, Any]]) -> list[str]:
    """The threats of all of several sets of soups."""
    known = [[name for name in one["soups"][0] if name not in (WEIGHTS, CLEAN, "union")] for one in found.values()]
    return [name for name in known[0] if all(name in names for names in known)] if len(known) > 1 else []


def _places(soups: list[dict[str, Any]], measure: str) -> tuple[list[float], list[float]]:
    return [one[CLEAN]["value"] for one in soups], [one[measure]["value"] for one in soups]


def front(points: np.ndarray) -> np.ndarray:
    """Indices of those points [n, 2] that no other is at least as good as in both and better in one, by the first."""
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    above = np.maximum.accumulate(np.concatenate([[-np.inf], points[order, 1]]))[:-1]
    return order[points[order, 1] > above][::-1]


def _measures(found: dict[str, Any]) -> list[str]:
    """Those of all soups; of a single threat without the union, which is the same."""
    measures = [name for name in found["soups"][0] if name != WEIGHTS]
    return measures[:2] if measures[2:] == ["union"] else measures


def _alone(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the members."""
    rows = np.eye(len(found["members"]))
    return [next(one for one in found["soups"] if np.allclose(one[WEIGHTS], row)) for row in rows]


def lines(found: dict[str, Any]) -> Figure:
    """A panel for every two members: each accuracy along the line of the soups between them, and beyond."""
    names, soups = found["members"], found["soups"]
    weights = np.array([one[WEIGHTS] for one in soups])
    measures = _measures(found)
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
