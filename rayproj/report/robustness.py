"""Attacked classifiers and defences in a report: what is right of them, over what it takes, and images that broke them."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayproj.report.figures import SERIES, panels


def robust_accuracy(found: dict[str, dict[str, Any]]) -> Figure:
    """Accuracy over the radius of each threat, of every classifier and, dashed, every defence that was attacked at several.

    Args:
        found: name -> what `rayproj.robustness.job.summary` gives.
    """
    curves = {name: one for name, one in found.items() if any(t.get("curve") for t in one["threats"].values())}
    threats = list(dict.fromkeys(threat for one in curves.values() for threat in one["threats"]))
    figure, axes = panels(len(threats), 3.0, 2.6)
    for axis, threat in zip(axes, threats, strict=False):
        for colour, (name, one) in zip(cycle(SERIES), curves.items()):
            points = [{"radius": 0.0, **one["clean"]}, *one["threats"][threat]["curve"]]
            _with_interval(axis, "radius", points, color=colour, linestyle="--" if "cost" in one else "-", label=name)
            axis.plot(
                [one["threats"][threat]["threat"]["eps"]],
                [one["threats"][threat]["robust"]["value"]],
                color=colour,
                marker="x",
            )
        axis.set_ylim(0, 1)
        axis.set_xlabel(f"{threat} radius")
        axis.set_ylabel("right under attack")
    if threats:
        axes[0].legend(frameon=False, fontsize=8)
    return figure


def _with_interval(axis: Axes, along: str, points: list[dict[str, float]], **style: Any) -> None:
    """Accuracies that have "value", "low" and "high", over what each point has at `along`."""
    x = [point[along] for point in points]
    axis.plot(x, [p["value"] for p in points], marker="o", markersize=3, **style)
    axis.fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=style["color"], alpha=0.15)


def defences_attacked(found: dict[str, dict[str, Any]]) -> Figure:
    """What is right of each defence under each attack, over the queries of the searches, and over its own steps, if it was
    attacked with several numbers of them; a column of panels for each threat.

    Args:
        found: name -> what `rayproj.robustness.job.summary` gives, of defences alone.
    """
    threats = next(iter(found.values()))["threats"]
    stepped = any(t["defence_steps"] for one in found.values() for t in one["threats"].values())
    figure, grid = plt.subplots(
        2 + stepped,
        len(threats),
        figsize=(3.4 * len(threats), 2.6 * (2 + stepped)),
        squeeze=False,
        layout="constrained",
    )
    for column, threat in enumerate(threats):
        by_attack, by_queries, *by_steps = grid[:, column]
        for number, (colour, (name, one)) in enumerate(zip(cycle(SERIES), found.items())):
            under, style = one["threats"][threat], {"color": colour, "label": name}
            held = [under["columns"][c]["value"] for c in under["columns"]] + [under["robust"]["value"]]
            places = np.arange(len(held)) + 0.8 * ((number + 0.5) / len(found) - 0.5)
            by_attack.bar(places, held, 0.8 / len(found), **style)
            by_attack.set_xticks(
                range(len(held)), [*under["columns"], "worst case"], rotation=60, ha="right", fontsize=7
            )
            for line, (search, points) in zip(("-", "--"), under["queries"].items(), strict=False):
                _with_interval(by_queries, "queries", points, color=colour, linestyle=line, label=f"{name}, {search}")
            for axis in by_steps if under["defence_steps"] else []:
                _with_interval(axis, "steps", under["defence_steps"], **style)
        by_attack.set_title(threat, fontsize=9)
        by_queries.set_xscale("symlog")
        by_queries.set_xlabel("queries of a search")
        for axis in by_steps:
            axis.set_xlabel("steps of the defence")
        for axis in grid[:, column]:
            axis.set_ylim(0, 1)
            axis.set_ylabel("right under attack")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=7)
    return figure


def robustness_and_cost(found: dict[str, dict[str, Any]]) -> Figure:
    """Worst-case accuracy of defences over what an answer of theirs costs, with their bases at a cost of one."""
    costs = {name: one for name, one in found.items() if "cost" in one}
    threats = list(next(iter(costs.values()))["threats"]) if costs else []
    figure, axes = panels(max(1, len(threats)), 3.0, 2.6)
    for axis, threat in zip(axes, threats, strict=False):
        for colour, (name, one) in zip(cycle(SERIES), costs.items()):
            base, own = one["threats"][threat]["columns"]["static"], one["threats"][threat]["robust"]
            times = max(1.0, one["cost"]["seconds"][1] / one["cost"]["seconds"][0])
            for x, point, marker in ((1.0, base, "s"), (times, own, "o")):
                error = [[point["value"] - point["low"]], [point["high"] - point["value"]]]
                label = name if marker == "o" else None
                axis.errorbar([x], [point["value"]], yerr=error, color=colour, marker=marker, capsize=3, label=label)
            axis.plot([1, times], [base["value"], own["value"]], color=colour, linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0, 1)
        axis.set_xlabel("time of an answer, times its base's")
        axis.set_ylabel(f"right in the worst case, {threat}")
        axis.legend(frameon=False, fontsize=8)
    return figure


def perturbed(rows: dict[str, tuple[np.ndarray, np.ndarray, list[str]]]) -> Figure:
    """Images, what an attack made of them, and the difference, magnified until its largest value is at the edge.

    Args:
        rows: title -> images and attacked images, fp32 [n, C, H, W] in [0, 1], and the images' classes.
    """
    count = max((len(clean) for clean, _, _ in rows.values()), default=1)
    figure, axes = plt.subplots(
        3 * len(rows), count, figsize=(0.9 * count + 1.2, 2.9 * len(rows)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (title, (clean, attacked, taken)) in enumerate(rows.items()):
        for k, (before, after, name) in enumerate(zip(clean, attacked, taken, strict=True)):
            moved = after - before
            largest = max(float(np.abs(moved).max()), 1e-12)
            shown = (before, after, 0.5 + 0.5 * moved / largest)
            for row, image in enumerate(shown):
                axis = axes[3 * number + row, k]
                axis.imshow(np.moveaxis(image, 0, -1).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes[3 * number + 1, k].set_title(name, fontsize=7, pad=2)
            axes[3 * number + 2, k].set_title(f"× {0.5 / largest:.0f}", fontsize=7, pad=2)
        axes[3 * number, 0].set_title(title, fontsize=8, loc="left")
    return figure
