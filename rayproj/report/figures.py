"""The pictures of a report, as SVG or PNG bytes. Colours are readable on a light and on a dark page."""

from __future__ import annotations

import io
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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


def curves(series: dict[str, tuple[list[float], list[float]]], ylabel: str) -> Figure:
    """Lines over steps: name -> (steps, values), each in its own panel, since their scales differ."""
    figure, axes = panels(len(series), 3.1, 2.3)
    for axis, (name, (x, y)), colour in zip(axes, series.items(), cycle(SERIES), strict=False):
        axis.plot(x, y, color=colour, linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3)
        axis.set_title(name)
        axis.set_xlabel("update")
        axis.set_ylabel(ylabel)
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
