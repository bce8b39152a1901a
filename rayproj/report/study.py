"""The report of a fairness study: arms of one classifier under several seeds, accuracy against the gap between groups, after
the figures of Ktena et al. 2024, "Generative models improve fairness of medical classifiers under distribution shifts".

It reads the points of a sweep, each with the axes "arm", "seed" and perhaps one more, a run of jobs/evaluate.py that kept
its predictions, and one of jobs/train_classifier.py. Nothing is computed anew but statistics.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from rayproj.classifiers.model import weights_of
from rayproj.config import below
from rayproj.data.cells import cells_of
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.fairness import Judged, adjusted, paired_over_seeds, replicates
from rayproj.evaluation.job import MAIN
from rayproj.report import figures
from rayproj.report.build import environment
from rayproj.report.pages import data_uri, rendered
from rayproj.storage.store import Store, from_json

ARM, SEED = "arm", "seed"
MEASURES = ("accuracy", "gap", "worst")
FURTHER = ("balanced accuracy", "AUC", "calibration error")
LEVEL = 0.05
MARKERS = "osD^vP*X"  # of the kinds of arms
Setting = tuple[str, str, str]
"""(arm, further axis, its value); ("", "") for the arms themselves."""


@dataclass
class ControlsConfig:
    """What must come out as it is said, or the study is not to be believed."""

    # arm -> one that it must not better: by a smaller gap, or as good a gap and a higher accuracy.
    no_better: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)  # "alpha=0" -> an arm that its points equal, bit for bit


@dataclass
class StudyConfig:
    """What is reported, of which sweep."""

    root: str = "runs/study"  # where study.html, study.json and study.png go
    sweep: str = "???"  # run dir of jobs/sweep.py
    baseline: str = "real"  # the arm that the others are compared with
    tests: dict[str, str] = field(
        default_factory=dict
    )  # title -> the test images as they were evaluated, in domain first
    groups: list[str] = field(default_factory=list)  # attributes of theirs that make the groups together
    group_examples: int = 10  # groups with fewer images of a test set are left out of it
    cluster_by: str = ""  # attribute whose images are alike, and are drawn together in a bootstrap
    kinds: dict[str, list[str]] = field(default_factory=dict)  # kind, such as synthetic -> its arms
    usual: dict[str, str] = field(default_factory=dict)  # further axis -> the value that the arms themselves have
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    filters: dict[str, str] = field(default_factory=dict)  # title -> run dir of jobs/curate.py with curate.cells
    shown: dict[str, str] = field(default_factory=dict)  # title -> images of which some are shown
    shown_by: list[str] = field(default_factory=lambda: ["label"])  # fields of theirs, a row for each combination
    bootstraps: int = 2000

    def problems(self) -> list[str]:
        found = [] if self.tests and self.groups else ["tests and groups must name what the sweep evaluated."]
        return found + below(0, "study", self, "group_examples", "bootstraps")


@dataclass(frozen=True)
class Points:
    """What the sweep's points said.

    Attributes:
        right: by setting and test set, bool [seeds, n].
        measures: by setting and test set, of each seed what else there is to say of all images.
        trained: run dirs of the classifiers by setting, in the order of the seeds.
        groups, clusters: by test set, [n].
        left_out: by test set, the groups that are too small, and how many images they have.
    """

    right: dict[Setting, dict[str, np.ndarray]]
    measures: dict[Setting, dict[str, list[dict[str, float]]]]
    trained: dict[Setting, list[str]]
    groups: dict[str, list[str]]
    clusters: dict[str, list[str] | None]
    left_out: dict[str, dict[str, int]]


def read(config: StudyConfig) -> Points:
    """Read the points.

    Raises:
        UserError: the sweep is not done, or its points lack an axis, a seed or the predictions.
    """
    store = Store(config.sweep)
    if not store.exists("table.json"):
        raise UserError(f"There is no table of a sweep at '{config.sweep}'; run it to its end first.")
    found: dict[Setting, dict[str, dict[str, np.ndarray]]] = {}
    measures: dict[Setting, dict[str, dict[str, dict[str, float]]]] = {}
    trained: dict[Setting, dict[str, str]] = {}
    groups: dict[str, list[str]] = {}
    for row in from_json(store.read("table.json")):
        axes = dict(row["axes"])
        if ARM not in axes or SEED not in axes or len(axes) > 3:
            raise UserError(f"The point '{row['point']}' must have the axes arm, seed and at most one more.")
        arm, seed = axes.pop(ARM), axes.pop(SEED)
        setting = (arm, *next(iter(axes.items()), ("", "")))
        jobs = {result["job"]: name for name, result in row["results"].items()}  # of several trainings the last
        run = Store(row["runs"][jobs["evaluate"]])
        found.setdefault(setting, {})[seed], told = _right(run, config, groups)
        measures.setdefault(setting, {})[seed] = told
        trained.setdefault(setting, {})[seed] = row["runs"][jobs["train_classifier"]]
    seeds = sorted(found.get((config.baseline, "", ""), {}))
    if not seeds:
        arms = dict.fromkeys(arm for arm, *_ in found)
        raise UserError(f"The sweep has no arm '{config.baseline}'; it has {', '.join(arms)}.")
    if wrong := [setting for setting, by in found.items() if sorted(by) != seeds]:
        raise UserError(f"'{wrong[0][0]}' was not run under the seeds of '{config.baseline}': {', '.join(seeds)}.")
    left_out = {title: _left_out(groups[title], config.group_examples) for title in config.tests}
    kept = {title: [i for i, g in enumerate(groups[title]) if g not in left_out[title]] for title in config.tests}
    if lost := [title for title, at in kept.items() if not at]:
        raise UserError(f"'{lost[0]}' has no group with {config.group_examples} images; lower group_examples.")
    clusters = {
        title: _column(uri, config.cluster_by, kept[title]) if config.cluster_by else None
        for title, uri in config.tests.items()
    }
    return Points(
        {
            s: {title: np.stack([by[seed][title][at] for seed in seeds]) for title, at in kept.items()}
            for s, by in found.items()
        },
        {s: {title: [by[seed][title] for seed in seeds] for title in config.tests} for s, by in measures.items()},
        {s: [by[seed] for seed in seeds] for s, by in trained.items()},
        {title: [groups[title][i] for i in at] for title, at in kept.items()},
        clusters,
        left_out,
    )


def _right(
    run: Store, config: StudyConfig, groups: dict[str, list[str]]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Whether the classifier of a run is right, by test set, and its other measures; fills in the groups."""
    import pyarrow.parquet as pq

    if not run.exists("predictions.parquet"):
        raise UserError(f"{run.uri} kept no predictions; evaluate with evaluate.predictions=true.")
    table = pq.read_table(io.BytesIO(run.read("predictions.parquet"))).to_pydict()
    tests, found, told = np.array(table["test"]), {}, {}
    for number, title in enumerate(config.tests):
        at = np.flatnonzero(tests == (title if number else MAIN))
        if not len(at):
            raise UserError(f"{run.uri} did not evaluate '{title}'; the first of tests is evaluate.test.")
        found[title] = np.array(table["label"])[at] == np.array(table["prediction"])[at]
        told[title] = _measures(table, at, Dataset.open(config.tests[title]).header.classes)
        rows = ([table[name][i] for name in config.groups] for i in at)
        groups[title] = ["" if None in row or "" in row else " × ".join(map(str, row)) for row in rows]
    return found, told


def _measures(table: dict[str, list[Any]], at: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
    """What the probabilities of these rows say, where they were kept."""
    if "probabilities" not in table:
        return {}
    labels = np.array([classes.index(table["label"][i]) for i in at])
    judged = Judged(labels, np.array([table["probabilities"][i] for i in at], np.float64))
    return {name: judged.measures()[name](np.arange(len(at))) for name in FURTHER}


def _left_out(groups: list[str], least: int) -> dict[str, int]:
    """Images by group, of groups that are too small to be measured; "" where the group is not known."""
    return {group: n for group, n in sorted(Counter(groups).items()) if not group or n < least}


def _column(uri: str, name: str, at: list[int]) -> list[str]:
    dataset = Dataset.open(uri)
    if name not in dataset.header.fields:
        raise UserError(f"{uri} has no attribute '{name}'; it has {', '.join(dataset.header.fields)}.")
    return list(map(str, Reader(dataset, [name]).gather(np.array(at))[name]))


def gather(config: StudyConfig) -> dict[str, Any]:
    """study.json: every number of the report."""
    points = read(config)
    base = points.right[config.baseline, "", ""]
    arms = [arm for arm, axis, _ in points.right if not axis]
    kinds = {arm: kind for kind, theirs in config.kinds.items() for arm in theirs}

    def compared(setting: Setting, other: dict[str, np.ndarray], test: str) -> dict[str, Any]:
        of = (points.groups[test], points.clusters[test], config.bootstraps)
        return paired_over_seeds(points.right[setting][test], other[test], *of)

    found: dict[str, Any] = {
        "tests": {},
        "baseline": config.baseline,
        "kinds": {arm: kinds.get(arm, "real") for arm in arms},
    }
    for test in config.tests:
        rows = {arm: _summary(points, (arm, "", ""), test) for arm in arms}
        others = [arm for arm in arms if arm != config.baseline]
        against = {arm: compared((arm, "", ""), base, test) for arm in others}
        for measure in MEASURES:
            for arm, p in zip(others, adjusted([against[arm][measure]["p"] for arm in others]), strict=True):
                against[arm][measure]["adjusted_p"] = p
        for arm in others:
            rows[arm]["against_baseline"] = against[arm]
        for arm in arms:
            rows[arm]["further"] = _further(points.measures[arm, "", ""][test])
        found["tests"][test] = {
            "images": len(points.groups[test]),
            "left_out": points.left_out[test],
            "arms": rows,
        }
    found["seeds"] = len(next(iter(base.values())))
    found["curves"] = _curves(config, points)
    found["controls"] = list(_controls(config, points, compared))
    found["filters"] = {title: _rates(Store(uri)) for title, uri in config.filters.items()}
    found["findings"] = findings(found)
    found["config"], found["environment"] = asdict(config), environment()
    return found


def _summary(points: Points, setting: Setting, test: str) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each measure."""
    values = replicates(points.right[setting][test], points.groups[test])
    return {
        name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1)), "values": v.tolist()} for name, v in values.items()
    }


def _further(seeds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    values = {name: np.array([one[name] for one in seeds]) for name in seeds[0]}
    return {name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1))} for name, v in values.items()}


def _curves(config: StudyConfig, points: Points) -> dict[str, Any]:
    """By further axis and arm, the values in order and what they gave on each test set; with what the arm itself gave."""
    found: dict[str, Any] = {}
    for axis in dict.fromkeys(axis for _, axis, _ in points.right if axis):
        here = [(arm, value) for arm, its, value in points.right if its == axis]
        for arm in dict.fromkeys(arm for arm, _ in here):
            settings = {value: (arm, axis, value) for a, value in here if a == arm}
            if axis in config.usual and (arm, "", "") in points.right:
                settings[config.usual[axis]] = (arm, "", "")
            found.setdefault(axis, {})[arm] = {
                value: {test: _summary(points, settings[value], test) for test in config.tests}
                for value in sorted(settings, key=_number)
            }
    return found


def _number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _controls(config: StudyConfig, points: Points, compared: Any) -> Iterable[dict[str, Any]]:
    """Each control with whether it held, and by which numbers."""
    for name, arm in config.controls.same.items():
        axis, _, value = name.partition("=")
        settings = [s for s in points.trained if s[1:] == (axis, value)]
        same = [
            _equal(a, b) for s in settings for a, b in zip(points.trained[s], points.trained[arm, "", ""], strict=True)
        ]
        what = f"{name} equals {arm} bit for bit, in {len(same)} trainings"
        yield {"what": what, "held": bool(same) and all(same), "numbers": {"equal": sum(same), "of": len(same)}}
    first = next(iter(config.tests))
    for arm, other in config.controls.no_better.items():
        difference = compared((arm, "", ""), points.right[other, "", ""], first)
        gap, accuracy = difference["gap"], difference["accuracy"]
        worse_gap = gap["difference"] < 0 and gap["p"] < LEVEL
        more_right = accuracy["difference"] > 0 and accuracy["p"] < LEVEL
        what = f"{arm} is no better than {other} on {first}, neither by a smaller gap nor by a higher accuracy"
        yield {"what": what, "held": not worse_gap and not more_right, "numbers": difference}


def _equal(one: str, other: str) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _rates(run: Store) -> dict[str, Any]:
    """What filters let pass, by cell."""
    result = from_json(run.read("result.json"))
    cells = {name: {**c, "rate": c["kept"] / c["samples"]} for name, c in (result.get("cells") or {}).items()}
    return {"samples": result["samples"], "kept": result["kept"], "reasons": result["reasons"], "cells": cells}


def findings(found: dict[str, Any]) -> list[str]:
    """One sentence for each test set on what helped by the adjusted p-values, and one on synthetic against real images."""
    said = []
    for test, of in found["tests"].items():
        arms = of["arms"]

        def moved(measure: str, sign: int, arms: dict[str, Any] = arms) -> list[str]:
            against = {arm: row["against_baseline"][measure] for arm, row in arms.items() if "against_baseline" in row}
            return [a for a, d in against.items() if d["adjusted_p"] < LEVEL and sign * d["difference"] > 0]

        lines = [("a smaller gap", moved("gap", -1)), ("a larger gap", moved("gap", 1))]
        lines += [("a higher accuracy", moved("accuracy", 1)), ("a lower accuracy", moved("accuracy", -1))]
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in lines if names)
        best = {
            kind: min((a for a in arms if found["kinds"][a] == kind), key=lambda a: arms[a]["gap"]["mean"])
            for kind in dict.fromkeys(found["kinds"].values())
        }
        ranked = "; ".join(f"{kind}: {a} ({_both(arms[a])})" for kind, a in best.items())
        said.append(f"On {test}, against {found['baseline']} ({_both(arms[found['baseline']])}): "
                    f"{told or 'no arm differs beyond chance'}. Smallest gap of each kind: {ranked}.")  # fmt: skip
    return said


def _both(row: dict[str, Any]) -> str:
    return f"accuracy {row['accuracy']['mean']:.3f}, gap {row['gap']['mean']:.3f}"


def samples(config: StudyConfig, per_cell: int = 8) -> tuple[dict[str, np.ndarray], list[str]]:
    """Images of each set, uint8 [cells, per_cell, C, H, W], and the cells' names."""
    columns, names = dict[str, np.ndarray](), list[str]()
    for title, uri in config.shown.items():
        dataset = Dataset.open(uri)
        cells = cells_of([dataset], config.shown_by)
        rows = []
        for number in range(len(cells.names)):
            at = np.flatnonzero(cells.numbers == number)[:per_cell]
            images = Reader(dataset, ["image"]).gather(at)["image"]
            rows.append(np.concatenate([images, np.full((per_cell - len(at), *images.shape[1:]), 255, np.uint8)]))
        columns[title], names = np.stack(rows), list(cells.names)
    return columns, names


def accuracy_against_gap(study: dict[str, Any]) -> Figure:
    """A panel for each test set, a marker for each arm: means over the seeds with standard deviations. Up and to the left is
    better.

    Args:
        study: of `gather`.
    """
    tests, kinds = study["tests"], list(dict.fromkeys(study["kinds"].values()))
    columns = min(2, len(tests))
    rows = -(-len(tests) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns + 1.6, 3.7 * rows), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab20")(np.linspace(0, 0.999, max(2, len(study["kinds"]))))
    for axis, (test, of) in zip(axes.flat, tests.items(), strict=False):
        for (arm, row), colour in zip(of["arms"].items(), colours, strict=False):
            marker = MARKERS[kinds.index(study["kinds"][arm]) % len(MARKERS)]
            gap, accuracy = row["gap"], row["accuracy"]
            axis.errorbar(
                gap["mean"], accuracy["mean"], xerr=gap["sd"], yerr=accuracy["sd"], color=colour, ecolor=(*colour[:3], 0.35),
                marker=marker, markersize=8 if arm == study["baseline"] else 6, linestyle="", elinewidth=1, label=arm,
                markeredgecolor="black" if arm == study["baseline"] else colour,
            )  # fmt: skip
        axis.set_title(test)
        axis.set_xlabel("gap between groups")
        axis.set_ylabel("accuracy")
    for axis in list(axes.flat)[len(tests) :]:
        axis.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    named = [f"{label.replace('_', ' ')} ({study['kinds'][label]})" for label in labels]
    figure.legend(handles, named, loc="outside right center", frameon=False, fontsize=8)
    return figure


def measures_over(axis_name: str, arms: dict[str, Any]) -> Figure:
    """Accuracy and gap over the values of an axis: a line for each arm, solid on the first test set, dashed in the mean over
    the others; bars are standard deviations over the seeds.

    Args:
        arms: arm -> value -> test set -> measure -> "mean", "sd" and "values".
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    values = list(dict.fromkeys(value for by in arms.values() for value in by))
    for (arm, by), colour in zip(arms.items(), cycle(figures.SERIES), strict=False):
        first, *others = next(iter(by.values()))
        place = [values.index(value) for value in by]
        for axis, measure in zip(axes, ("accuracy", "gap"), strict=True):
            inside = [by[value][first][measure] for value in by]
            mean, sd = [m["mean"] for m in inside], [m["sd"] for m in inside]
            axis.errorbar(
                place, mean, yerr=sd, color=colour, marker="o", markersize=4, capsize=3, label=f"{arm}, {first}"
            )
            if others:
                outside = [np.mean([by[value][test][measure]["mean"] for test in others]) for value in by]
                axis.plot(
                    place, outside, color=colour, linestyle="--", marker="o", markersize=3, label=f"{arm}, elsewhere"
                )
            axis.set_ylabel(measure)
    for axis in axes:
        axis.set_xticks(range(len(values)), values)
        axis.set_xlabel(axis_name)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def build(config: StudyConfig) -> tuple[dict[str, Any], str, bytes]:
    """study.json as a dict, study.html as text that needs no other file, and the plot of accuracy against gap as a PNG."""
    found = gather(config)
    plotted = figures.png(accuracy_against_gap(found))
    pictures = {"plot": data_uri(plotted, "png")}
    for axis, arms in found["curves"].items():
        pictures[f"curve {axis}"] = data_uri(figures.svg(measures_over(axis, arms)), "svg+xml")
    if config.shown:
        pictures["samples"] = data_uri(figures.png(figures.samples(*samples(config))), "png")
    return found, rendered("study.html", study=found, pictures=pictures), plotted
