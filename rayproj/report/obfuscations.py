"""Obfuscations to be looked at: a page with several draws of each, and the tables of the report."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayproj.data.encodings import ENCODINGS
from rayproj.errors import UserError
from rayproj.evaluation.obfuscations import SETS, TOP
from rayproj.obfuscation.assets import Assets, AssetsConfig
from rayproj.obfuscation.registry import CLEAN, HELD_OUT, OBFUSCATIONS, chosen, obfuscate, of_name
from rayproj.obfuscation.writing import NOTICE, open_images
from rayproj.report import figures
from rayproj.report.pages import data_uri, rendered

LEAST = 160  # pixels of a picture's side on the page; smaller images are drawn larger


def write_gallery(
    uri: str,
    file: str,
    draws: int = 6,
    photos: str = "",
    learned: str = "",
    names: Sequence[str] = ("all",),
    seed: int = 0,
) -> str:
    """Write an HTML page: each obfuscation in words, with its ranges, and so many draws of its parameters, of an image each
    as far as there are as many.

    Raises:
        UserError: the images or assets are not there.
    """
    images = open_images(uri, 224)
    if "image" not in images.header.fields:
        raise UserError(f"'{uri}' has no images; give a dataset that has.")
    view = np.arange(draws)
    index = view % images.header.num_samples
    shown = torch.from_numpy(images.gather(index)["image"])
    row = torch.from_numpy(np.stack([index, np.zeros_like(index), view], 1))
    config = AssetsConfig(photos=photos, learned=learned)
    assets = Assets.load(config)
    sections: list[dict[str, Any]] = [
        {"name": CLEAN, "text": "The images as they are.", "pictures": [(_uri(x), "") for x in shown.numpy()]}
    ]
    for name in chosen(names, config):
        changed, records = obfuscate(name, shown, row, seed, assets)
        kind = of_name(name)
        sections.append(
            {
                "name": name,
                "group": kind.group + (", held out" if kind.held_out else ""),
                "text": inspect.getdoc(kind),
                "ranges": ", ".join(f"{n} {r.low:.3g} to {r.high:.3g}" for n, r in kind.ranges().items()),
                "pictures": [(_uri(x), _text(r)) for x, r in zip(changed.numpy(), records, strict=True)],
            }
        )
    html = rendered("gallery.html", sections=sections, notice=NOTICE, least=LEAST)
    Path(file).write_text(html, encoding="utf-8")
    return file


def _uri(image: np.ndarray) -> str:
    times = max(1, LEAST // image.shape[1])
    large = image.repeat(times, axis=1).repeat(times, axis=2)
    return data_uri(ENCODINGS["jpg"].encode(large), "jpeg")


def _text(record: dict[str, Any]) -> str:
    def short(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(short, value)) + "]"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {short(value)}" for name, value in record.items())


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of a result of jobs/evaluate_obfuscations.py.

    Returns:
        "rows", by model: the columns for one guess with their intervals; "top", by model and number of guesses the same
        without; "images", how many of them; and "label_weighted".
    """
    columns = [CLEAN, *(f"{kind}-{title}" for title in SETS for kind in ("mean", "worst"))]
    any_model = next(iter(result["metrics"].values()))
    columns = [column for column in columns if f"{column}-top-1" in any_model]
    rows, top = {}, {}
    for name in result["models"]:
        found, intervals = result["metrics"][name], result["intervals"][name]
        rows[name] = [(found.get(f"{c}-top-1"), intervals.get(f"{c}-top-1")) for c in columns]
        top[name] = {n: [found.get(f"{c}-top-{n}") for c in columns] for n in TOP[1:]}
    kept = {key: result[key] for key in ("images", "seen", "label_weighted", "apart")}
    return {"columns": columns, "rows": rows, "top": top, **kept}


def obfuscations_of(result: dict[str, Any]) -> list[str]:
    """What a result of jobs/evaluate_obfuscations.py has accuracies of: the clean images, the benchmark's, users' own."""
    of_sets = {f"{kind}-{title}" for kind in ("mean", "worst") for title in SETS}
    keys = [key for metrics in result["metrics"].values() for key in metrics]
    measured = dict.fromkeys(found[1] for key in keys if (found := re.fullmatch("(.+)-top-1", key)))
    known = [name for name in (CLEAN, *OBFUSCATIONS) if name in measured]
    return [*known, *(name for name in measured if name not in known and name not in of_sets)]


def _accuracies(result: dict[str, Any], names: Sequence[str]) -> np.ndarray:
    """Top 1, [models, names]; not a number where a model has none."""
    return np.array([[result["metrics"][m].get(f"{n}-top-1", np.nan) for n in names] for m in result["models"]])


def radar(result: dict[str, Any]) -> bytes | None:
    """SVG: top 1 of each model along a spoke for each obfuscation, those held out in bold; None of less than three."""
    names = [name for name in obfuscations_of(result) if name != CLEAN]
    if len(names) < 3:
        return None
    clean = _accuracies(result, [CLEAN])[:, 0]
    rows = [
        f"{m} (clean {100 * c:.0f} %)" if np.isfinite(c) else m for m, c in zip(result["models"], clean, strict=True)
    ]
    marks = [k for k, name in enumerate(names) if name in HELD_OUT]
    return figures.svg(figures.radar(_accuracies(result, names), rows, [n.split(":")[-1] for n in names], marks))


def heat_map(result: dict[str, Any]) -> bytes:
    """SVG: top 1 by obfuscation and model; what a model was trained with is marked."""
    names = obfuscations_of(result)
    values = _accuracies(result, names)
    marks = np.array([[n in result["seen"][model] for n in names] for model in result["models"]])
    held_out = [k for k, n in enumerate(names) if n in HELD_OUT]
    own = [k for k, n in enumerate(names) if n not in (CLEAN, *OBFUSCATIONS)]
    lines = sorted({1, *held_out[:1], *own[:1]})
    return figures.svg(figures.heat_map(values, result["models"], names, marks, lines))
