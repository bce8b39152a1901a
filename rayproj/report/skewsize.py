"""SkewSize of a table of predictions: `rayproj evaluate skewsize`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from rayproj.errors import UserError
from rayproj.evaluation.skewsize import SkewSize, variables
from rayproj.evaluation.words import mapped, read_synonyms, text_embedder
from rayproj.report.figures import INK, SERIES, png


def read_table(path: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a Parquet, CSV or JSON-lines file; an empty cell of a CSV file, or NA and its like, is None.

    Raises:
        UserError: there is no such file or column, or it cannot be read.
    """
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    # Else an empty text would be a group, or a class, of its own.
    empty = csv.ConvertOptions(strings_can_be_null=True)
    read_csv = partial(csv.read_csv, convert_options=empty)
    readers = {".parquet": parquet.read_table, ".csv": read_csv, ".jsonl": json.read_json}
    if Path(path).suffix not in readers:
        raise UserError(f"'{path}' is to be a .parquet, .csv or .jsonl file.")
    encoded = UserError(f"'{path}' is no {Path(path).suffix} file of texts in UTF-8; save it as one.")
    try:
        table = readers[Path(path).suffix](path)
        names = table.column_names
    except FileNotFoundError:
        raise UserError(f"There is no file '{path}'; check the path.") from None
    except UnicodeDecodeError:
        raise encoded from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"'{path}' cannot be read: {str(error).splitlines()[0]}.") from error
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"'{path}' has no column '{missing[0]}'; it has {', '.join(names)}.")
    if any(pa.types.is_binary(table[name].type) for name in columns):  # as pyarrow reads texts in another encoding
        raise encoded
    return {name: table[name].to_pylist() for name in columns}


def of_table(
    path: str, prediction: str, label: str, groups: Sequence[str], *, plain: bool = False, words: bool = False,
    synonyms: str = "", embedder: str = "", rare: int = 0, vocabulary: int = 0, min_examples: int = 10,
    permutations: int = 200, bootstraps: int = 200, top: int = 5, by: str = "", together: int = 2,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """SkewSize by grouping variable, and by intersections of up to `together` of them.

    Args:
        words: predictions are free texts, which become a class where they are one (`mapped`).
        synonyms: a JSON file of texts and the classes that they mean.
        embedder: folder of a text model of transformers, by which the other texts become the nearest class.
        by: column, such as that of several models, for each of whose values there is one of each.

    Raises:
        UserError: the table lacks a column, or holds no row; there is no such file or model.
    """
    table = read_table(path, [prediction, label, *groups, *([by] if by else [])])
    if not table[label]:
        raise UserError(f"'{path}' holds no row.")
    predictions = table[prediction]
    if words or synonyms or embedder:
        table[label] = [None if c is None else str(c) for c in table[label]]
        classes = sorted({c for c in table[label] if c is not None})
        texts = ["" if p is None else str(p) for p in predictions]
        meant = read_synonyms(synonyms) if synonyms else None
        if unknown := [word for word in (meant or {}).values() if word not in classes]:
            raise UserError(f"'{synonyms}' has '{unknown[0]}', which is no class; they are {', '.join(classes)}.")
        words_of = mapped(texts, classes, meant, text_embedder(embedder) if embedder else None)
        predictions = [None if p is None else word for p, word in zip(predictions, words_of, strict=True)]
    found = {}
    owner = table[by] if by else [""] * len(predictions)
    for of in dict.fromkeys(owner):
        rows = [k for k, one in enumerate(owner) if one == of]
        for name, values in variables({g: [table[g][k] for k in rows] for g in groups}, together).items():
            metric = SkewSize(not plain, min_examples, rare, vocabulary)
            metric.update([table[label][k] for k in rows], [predictions[k] for k in rows], values)
            found[f"{of}, {name}" if by else name] = metric.compute(permutations, bootstraps, top=top)
    return found


def text_of(found: dict[str, dict[str, Any]]) -> str:
    """A page for a terminal."""
    return "\n\n".join(_text(name, one) for name, one in found.items())


def _text(name: str, s: dict[str, Any]) -> str:
    missing = {"a class or a prediction": s["incomplete"], "a group": s["dropped"]}
    left_out = [f"  {n:,} rows without {what} were left out" for what, n in missing.items() if n]
    if s["mean"] is None:
        return "\n".join([f"{name}: {s['reason']}.", *left_out])
    value = s["reason"] if s["value"] is None else f"{s['value']:.2f}{_between(s['interval'])}"
    chance = "" if s["null_std"] is None else f"; by chance {s['null_mean']:.2f} ± {s['null_std']:.2f}"
    kind = "bias-corrected" if s["corrected"] else "plain"
    lines = [
        f"{name}: SkewSize {value}{chance}",
        f"  effect ({kind} Cramér's V): mean {s['mean']:.3f}{_between(s['mean_interval'])}, median {s['median']:.3f}, "
        f"90 % {s['q90']:.3f}, largest {s['max']:.3f}",
        f"  accuracy {s['accuracy']:.3f}; worst group {s['worst_group']} {s['worst_group_accuracy']:.3f}, gap "
        f"{s['accuracy_gap']:.3f}",
        f"  {s['examples']:,} examples; of {len(s['effects'])} classes, those that depend on the group beyond chance: "
        f"{len(s['significant'])}, with tables too thin to say: {s['classes_thin']}, with too few examples: "
        f"{s['classes_skipped']}",
    ]
    if 2 * s["classes_thin"] > len(s["effects"]):
        lines.append("  most tables are too thin for their V to mean much: give more examples, or fewer groups")
    lines += left_out
    for driver in s["drivers"]:
        moved = "; ".join(
            f"{c['prediction']} for {c['group']} {c['count']} times, not {c['expected']:.1f}" for c in driver["shifted"]
        )
        lines.append(f"  {driver['class']} ({driver['effect']:.2f}): {moved}")
    return "\n".join(lines)


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"


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


def run(arguments: Any) -> int:
    """The command."""
    found = of_table(
        arguments.table, arguments.prediction, arguments.label, arguments.group, plain=arguments.plain,
        words=arguments.words, synonyms=arguments.synonyms, embedder=arguments.embedder, rare=arguments.rare,
        vocabulary=arguments.vocabulary, min_examples=arguments.min_examples, permutations=arguments.permutations,
        bootstraps=arguments.bootstraps, top=arguments.top, by=arguments.by, together=arguments.together,
    )  # fmt: skip
    print(text_of(found))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if arguments.picture:
        Path(arguments.picture).write_bytes(png(effect_sizes(found)))
    if arguments.residuals:
        Path(arguments.residuals).write_bytes(png(residuals(found)))
    return 0
