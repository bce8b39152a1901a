"""The pictures of a report, as SVG or PNG bytes. Colours are readable on a light and on a dark page."""

from __future__ import annotations

import io
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayproj.evaluation.watermark import REAL

INK = "#7a869a"  # axes and text: between the two backgrounds
COLOURS = {"real": "#2a9d8f", "public": "#e09f3e", "private": "#c8553d"}
PANELS = 4  # in a row
SERIES = ["#4c86c6", "#e09f3e", "#c8553d", "#2a9d8f", "#8d6cc1", "#7a869a"]
STYLES = ["-", "--", ":", "-."]

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "rayproj",
    }
)


def svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def samples(columns: dict[str, np.ndarray], classes: list[str], zoom: float = 0.5) -> Figure:
    """Real beside synthetic images: a row for each class, a block of images for each source.

    Args:
        columns: title -> uint8 [classes, images, C, H, W].
    """
    blocks = len(columns)
    per = next(iter(columns.values())).shape[1]
    figure, axes = plt.subplots(
        1, blocks, figsize=(zoom * per * blocks + 1.2, zoom * len(classes) + 0.4), squeeze=False, layout="constrained"
    )
    for axis, (title, images) in zip(axes[0], columns.items(), strict=True):
        rows, count, channels, height, width = images.shape
        sheet = images.transpose(0, 3, 1, 4, 2).reshape(rows * height, count * width, channels)
        axis.imshow(sheet[..., 0] if channels == 1 else sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axes[0][0].set_yticks([(i + 0.5) * height for i in range(rows)], classes)
    axes[0][0].tick_params(length=0)
    return figure


def curves(series: dict[str, tuple[list[float], list[float]]], ylabel: str, log: bool = False) -> Figure:
    """Lines over steps: name -> (steps, values), each in its own panel, since their scales differ."""
    figure, axes = panels(len(series), 3.1, 2.3)
    for axis, (name, (x, y)), colour in zip(axes, series.items(), cycle(SERIES), strict=False):
        axis.plot(x, y, color=colour, linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3)
        axis.set_title(name)
        axis.set_xlabel("update")
        axis.set_ylabel(ylabel)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    return figure


def accuracy_bars(accuracy: dict[str, dict[str, Any]], chance: float, titles: dict[str, str]) -> Figure:
    """Accuracies with their 95 % intervals, and the level of guessing."""
    figure, axis = plt.subplots(figsize=(5.6, 0.55 * len(accuracy) + 0.8), layout="constrained")
    for i, (name, value) in enumerate(reversed(accuracy.items())):
        error = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
        axis.barh(i, value["value"], color=COLOURS.get(name, SERIES[0]), xerr=error, ecolor=INK, capsize=3, height=0.6)
        axis.text(0.01, i, f"{value['value']:.3f}", va="center", color="white", fontweight="bold")
    axis.set_yticks(range(len(accuracy)), [titles.get(name, name) for name in reversed(accuracy)])
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    axis.text(chance, len(accuracy) - 0.45, " guessing", fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_xlabel("accuracy on real test images (bars: 95 % interval)")
    return figure


def confusions(matrices: dict[str, list[list[int]]], classes: list[str], titles: dict[str, str]) -> Figure:
    """Confusion matrices as shares of the true class."""
    figure, axes = panels(len(matrices), 3.8, 3.9)
    for number, (axis, (name, counts)) in enumerate(zip(axes, matrices.items(), strict=False)):
        share = np.array(counts) / np.maximum(1, np.sum(counts, axis=1, keepdims=True))
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.argwhere(share >= 0.1):
            axis.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=6.5,
                      color="white" if share[i, j] > 0.5 else "#223")  # fmt: skip
        axis.set_title(titles.get(name, name))
        axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(classes)), classes if number % PANELS == 0 else [], fontsize=7)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true" if number % PANELS == 0 else "")
    return figure


def effect_sizes(found: dict[str, dict[str, Any]]) -> Figure:
    """By name of a SkewSize, the effect sizes of its classes, against the gaps of these, and what is commonly looked at."""
    shown = {name: s for name, s in found.items() if s["effects"]}
    figure, axes = plt.subplots(
        max(1, len(shown)), 3, figsize=(11, 0.4 + 2.1 * max(1, len(shown))), squeeze=False, width_ratios=[3, 2, 2],
        layout="constrained",
    )  # fmt: skip
    for (left, middle, right), (name, s) in zip(axes, shown.items(), strict=False):
        left.hist(list(s["effects"].values()), bins=np.linspace(0, 1, 41).tolist(), color=SERIES[0])
        if s["null_band"] is not None:
            left.axvspan(*s["null_band"], color=INK, alpha=0.12, label="most by chance")
            left.axvline(s["null_mean_effect"], color=INK, linestyle="--", label="mean by chance")
            left.legend(frameon=False)
        left.set_title(f"{name}: SkewSize {'undefined' if s['value'] is None else format(s['value'], '.2f')}")
        left.set_xlabel("effect size of the group")
        left.set_ylabel("classes")
        left.yaxis.get_major_locator().set_params(integer=True)
        middle.scatter(
            list(s["class_gaps"].values()), list(s["effects"].values()), s=14, color=SERIES[0], alpha=0.7, linewidths=0
        )
        middle.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="gap of the class", ylabel="its effect size")
        bars = {"accuracy": s["accuracy"], "worst group": s["worst_group_accuracy"], "gap": s["accuracy_gap"]}
        right.barh(list(bars), list(bars.values()), color=SERIES[1])
        for place, value in enumerate(bars.values()):
            right.text(value + 0.01, place, f"{value:.3f}", va="center")
        right.set_xlim(0, 1.2)
        right.invert_yaxis()
    return figure


def residuals(found: dict[str, dict[str, Any]], most: int = 4) -> Figure:
    """By name of a SkewSize, the tables of the classes that drive it: by how many deviations a group has a prediction more
    (red) or less (blue) often than if the two did not depend."""
    shown = {name: s["drivers"][:most] for name, s in found.items() if s["drivers"]}
    figure, axes = plt.subplots(
        max(1, len(shown)),
        most,
        figsize=(3.1 * most, 0.4 + 2.4 * max(1, len(shown))),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    image = None
    for row, (name, drivers) in zip(axes, shown.items(), strict=False):
        for axis, driver in zip(row, drivers, strict=False):
            axis.set_visible(True)
            image = axis.imshow(driver["residuals"], cmap="RdBu_r", vmin=-6, vmax=6, aspect="auto")
            axis.set_xticks(range(len(driver["groups"])), driver["groups"], rotation=30, ha="right")
            axis.set_yticks(range(len(driver["predictions"])), driver["predictions"])
            axis.set_title(f"{name}\n{driver['class']}: {driver['effect']:.2f}", fontsize=9)
            for y, values in enumerate(driver["residuals"]):
                for x, value in enumerate(values):
                    axis.text(
                        x, y, f"{value:+.1f}", ha="center", va="center", color="white" if abs(value) > 2.8 else "black"
                    )
    if image is not None:
        figure.colorbar(image, ax=axes, label="(observed - expected) / √expected", shrink=0.8, extend="both")
    return figure


MARKERS = "osD^vP*X"


def accuracy_against_gap(study: dict[str, Any]) -> Figure:
    """A panel for each test set, a marker for each arm: means over the seeds with standard deviations. Up and to the left is
    better.

    Args:
        study: of `rayproj.report.study.gather`.
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
    for (arm, by), colour in zip(arms.items(), cycle(SERIES), strict=False):
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


def privacy_and_use(rows: list[dict[str, Any]], real: dict[str, Any] | None) -> Figure:
    """Accuracy and Fréchet distance over ε, of models that began with a public one and of those that did not.

    Args:
        rows: of `build.privacy_and_use`.
        real: the accuracy of training on real images, with its interval.
    """
    values = sorted({row["epsilon"] for row in rows if row["epsilon"]})
    place: dict[float | None, int] = {0.0: 0, **{e: i + 1 for i, e in enumerate(values)}, None: len(values) + 1}
    labels = ["0", *(f"{value:.3g}" for value in values), "∞"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    for scratch, title, colour in (
        (False, "begun with the public model", SERIES[0]),
        (True, "from scratch", SERIES[2]),
    ):
        # ε = 0 is the public model itself, where a line of those that began with it starts.
        line = [r for r in rows if r["accuracy"] and scratch == (r["from_scratch"] and r["epsilon"] != 0)]
        line.sort(key=lambda row: place[row["epsilon"]])
        if not line:
            continue
        x = [place[row["epsilon"]] for row in line]
        y = np.array([row["accuracy"]["value"] for row in line])
        error = [y - [r["accuracy"]["low"] for r in line], [r["accuracy"]["high"] for r in line] - y]
        axes[0].errorbar(x, y, yerr=error, color=colour, marker="o", markersize=4, capsize=3, label=title)
        axes[1].plot(x, [row["frechet_distance"] for row in line], color=colour, marker="o", markersize=4, label=title)
    if real:
        axes[0].axhline(real["value"], color=COLOURS["real"], linestyle="--", linewidth=1, label="real images")
    axes[0].set_ylim(0, 1)
    axes[0].set_ylabel("accuracy on real test images")
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("Fréchet distance")
    for axis in axes:
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.3, len(labels) - 0.7)
        axis.set_xlabel("ε of the private images")
        axis.legend(frameon=False, fontsize=8)
    return figure


def watermark(found: dict[str, dict[str, Any]]) -> Figure:
    """True over false positives of the watermark's detector, one line for each attack, one panel for each set.

    Args:
        found: "sets" of `rayproj.evaluation.watermark.survivals`.
    """
    real = found[REAL]
    marked = {name: one for name, one in found.items() if name != REAL}
    figure, axes = panels(len(marked), 3.0, 2.6)
    for axis, (name, attacks) in zip(axes, marked.items(), strict=False):
        for number, (attack, one) in enumerate(attacks.items()):
            colour, style = SERIES[number % len(SERIES)], "-" if number < len(SERIES) else "--"
            thresholds = np.sort([-np.inf, *one["scores"], *real[attack]["scores"], np.inf])[::-1, None]
            rates = [(np.asarray(of[attack]["scores"]) >= thresholds).mean(1) for of in (real, attacks)]
            axis.plot(*rates, style, color=colour, linewidth=1, label=f"{attack} ({one['area']:.2f})")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("real images found")
        axis.set_ylabel("marked images found")
        axis.legend(frameon=False, fontsize=7)
    return figure


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


def heat_map(values: np.ndarray, rows: list[str], columns: list[str], marks: np.ndarray, lines: list[int]) -> Figure:
    """Shares as percents, in colour.

    Args:
        values: [rows, columns] in [0, 1]; not a number where there is none.
        marks: bool, of the same shape: what is printed bold, in a box.
        lines: columns before which a line separates.
    """
    size = (0.42 * len(columns) + 2.2, 0.36 * len(rows) + 1.9)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, x in np.argwhere(np.isfinite(values)):
        ink = "black" if values[y, x] > 0.6 else "white"
        weight = "bold" if marks[y, x] else "normal"
        axis.text(x, y, f"{100 * values[y, x]:.0f}", ha="center", va="center", fontsize=7, color=ink, weight=weight)
        if marks[y, x]:
            box = plt.Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=ink, linewidth=0.8)
            axis.add_patch(box)
    for x in lines:
        axis.axvline(x - 0.5, color="white", linewidth=3)
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def radar(values: np.ndarray, rows: list[str], columns: list[str], marks: list[int]) -> Figure:
    """Shares in [0, 1], from the centre outwards, a spoke for each column and a line for each row.

    Args:
        values: [rows, columns]; not a number where there is none: there a line is broken.
        marks: columns whose names are printed bold.
    """
    axis: Any  # of a kind that matplotlib's types do not tell
    figure, axis = plt.subplots(figsize=(7.6, 6.2), subplot_kw={"projection": "polar"}, layout="constrained")
    angles = 2 * np.pi * np.arange(len(columns)) / len(columns)
    for number, (name, line) in enumerate(zip(rows, values, strict=True)):
        look = {"color": SERIES[number % len(SERIES)], "linestyle": STYLES[number // len(SERIES) % len(STYLES)]}
        closed = np.append(line, line[:1])
        axis.plot(np.append(angles, angles[:1]), closed, linewidth=1.4, marker=".", label=name, **look)
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_ylim(0, 1)
    axis.set_yticks([0.25, 0.5, 0.75, 1.0], ["25", "50", "75", "100 %"], fontsize=7)
    axis.set_xticks(angles, columns, fontsize=8)
    for number, (label, angle) in enumerate(zip(axis.get_xticklabels(), angles, strict=True)):
        side = np.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        label.set_fontweight("bold" if number in marks else "normal")
    axis.grid(color=INK, alpha=0.35, linewidth=0.6)
    axis.spines[:].set_visible(False)
    axis.set_rlabel_position(180 / len(columns))  # between the first two spokes
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """As many axes, at most PANELS in a row."""
    columns = min(PANELS, count)
    rows = -(-count // columns)
    size = (width * columns + 0.4, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat


def timeline(spans: list[dict[str, Any]]) -> Figure:
    """What every actor was at, over time: spans with "stage", "actor", "start" and "end" (unix seconds)."""
    origin = min(span["start"] for span in spans)
    rows = list(dict.fromkeys((s["stage"], s["actor"]) for s in sorted(spans, key=lambda s: s["start"])))
    stages = list(dict.fromkeys(stage for stage, _ in rows))
    figure, axis = plt.subplots(figsize=(9.2, 0.21 * len(rows) + 0.8), layout="constrained")
    for span in spans:
        row = rows.index((span["stage"], span["actor"]))
        colour = SERIES[stages.index(span["stage"]) % len(SERIES)]
        axis.barh(row, span["end"] - span["start"], left=span["start"] - origin, height=0.7, color=colour,
                  edgecolor="white", linewidth=0.3)  # fmt: skip
    axis.set_yticks(range(len(rows)), [f"{stage}  {actor}" for stage, actor in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("seconds since the start")
    return figure
