"""The page of `jobs/evaluate_shift.py`: epistemic networks in distribution and under shift, and what they cost."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from rayproj.evaluation.epistemic import TOGETHER
from rayproj.report import figures
from rayproj.report.pages import data_uri, rendered

TITLES = {
    "accuracy": "accuracy",
    "marginal_nll": "log-loss",
    "joint_nll": "joint log-loss",
    "dyadic_nll_exact": "dyadic log-loss",
    "dyadic_nll_independent": "were labels independent",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "rms_calibration_error": "its RMS",
    "risk_coverage_area": "risk over coverage",
    "error_auroc": "wrong told from right, AUROC",
    "doubt_epistemic": "epistemic doubt",
}


def grouped(result: dict[str, Any]) -> dict[str, list[str]]:
    """Conditions by what is shown as one: the test images, each shifted set, all corruptions together, all obfuscations."""
    found: dict[str, list[str]] = {}
    for condition in result["conditions"]:
        title = {"in_distribution": "in distribution", "corrupted": "corrupted", "obfuscated": "obfuscated"}.get(
            condition["family"], condition["name"]
        )
        found.setdefault(title, []).append(condition["name"])
    return found


def by_number(counts: dict[str, Any]) -> dict[str, Any]:
    """What is kept by number of indices, in the order of these: JSON keeps numbers as texts, sorted as such."""
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def mean_of(by_condition: dict[str, dict[str, float]], names: list[str], measure: str) -> float:
    """Over what has the measure; not a number if nothing has."""
    values = [value for name in names if (value := by_condition[name].get(measure)) is not None]
    return float(np.mean(values)) if values else np.nan


def largest(result: dict[str, Any]) -> dict[str, str]:
    """The number of indices of each network that is shown where one has to be: the most that it was judged with."""
    return {name: max(by, key=int) for name, by in result["measures"].items()}


def loss_over_compute(result: dict[str, Any], measure: str = "dyadic_nll_exact") -> Figure:
    """A panel for each group of conditions: the loss of every network over the operations of predicting an image, a line
    along its numbers of indices."""
    groups = grouped(result)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3.3 * len(groups) + 1.8, 3.0), squeeze=False, layout="constrained"
    )
    cost = {(row["network"], row["indices"]): row["inference_flops"] for row in result["costs"]}
    for axis, (title, names) in zip(axes[0], groups.items(), strict=True):
        for (network, by), colour in zip(result["measures"].items(), cycle(figures.SERIES), strict=False):
            counts = list(by_number(by))
            x = [cost[network, int(count)] for count in counts]
            y = [mean_of(by[count], names, measure) for count in counts]
            axis.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=network)
            if len(counts) > 1:
                axis.annotate(counts[-1], (x[-1], y[-1]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title)
        axis.set_xlabel("operations per image")
    axes[0][0].set_ylabel(TITLES.get(measure, measure))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def loss_over_severity(result: dict[str, Any], family: str = "corrupted", measure: str = "dyadic_nll_exact") -> Figure:
    """The loss of each network, with all its indices, over the severity of corruptions or obfuscations; 0 is without."""
    by_severity: dict[int, list[str]] = {}
    for condition in result["conditions"]:
        if condition["family"] in ("in_distribution", family):
            by_severity.setdefault(condition["severity"], []).append(condition["name"])
    severities = sorted(by_severity)
    figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for (network, count), colour in zip(largest(result).items(), cycle(figures.SERIES), strict=False):
        by = result["measures"][network][count]
        y = [mean_of(by, by_severity[severity], measure) for severity in severities]
        axis.plot(severities, y, color=colour, marker="o", markersize=3.5, label=network)
    axis.set_xticks(severities)
    axis.set_xlabel("severity")
    axis.set_ylabel(TITLES.get(measure, measure))
    axis.legend(frameon=False, fontsize=7)
    return figure


def loss_over_together(result: dict[str, Any]) -> Figure:
    """The joint log-loss for each label, over how many labels of two test images are asked for together: level where a
    network does not know what its doubts have in common."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for (network, count), colour in zip(largest(result).items(), cycle(figures.SERIES), strict=False):
        by = by_number(result["labels_together"][network][count])
        axis.plot([int(n) for n in by], list(by.values()), color=colour, marker="o", markersize=3.5, label=network)
    axis.set_xscale("log")
    axis.set_xticks(TOGETHER, map(str, TOGETHER))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("labels together")
    axis.set_ylabel("joint log-loss per label")
    axis.legend(frameon=False, fontsize=7)
    return figure


def page(result: dict[str, Any]) -> str:
    """HTML that needs no other file."""
    pictures = {
        "compute": data_uri(figures.svg(loss_over_compute(result)), "svg+xml"),
        "together": data_uri(figures.svg(loss_over_together(result)), "svg+xml"),
    }
    for family in ("corrupted", "obfuscated"):
        if any(c["severity"] and c["family"] == family for c in result["conditions"]):
            pictures[family] = data_uri(figures.svg(loss_over_severity(result, family)), "svg+xml")
    tables = {
        title: {
            (network, count): {m: mean_of(by, names, m) for m in TITLES}
            for network, counts in result["measures"].items()
            for count, by in by_number(counts).items()
        }
        for title, names in grouped(result).items()
    }
    errors = result["corruption_errors"].get("networks", {})
    return rendered(
        "shift.html", result=result, pictures=pictures, tables=tables, titles=TITLES, largest=largest(result),
        sets=grouped(result),
        corruption_errors={network: by_number(counts) for network, counts in errors.items()},
    )  # fmt: skip
