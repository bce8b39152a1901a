"""What is said of text-to-image models, on one page."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.evaluation.proportions import LEAST
from rayproj.judging.paired import LEVEL
from rayproj.judging.scoring import JudgeConfig
from rayproj.report.figures import SERIES, svg, watermark
from rayproj.report.pages import data_uri, picture_uri, rendered
from rayproj.report.preferences import TITLES, picture
from rayproj.responsibility.safety import Safety

SHOWN = 12  # prompts with pictures

QUALITY = {
    "frechet_distance": "Fréchet distance",
    "frechet_distance_limit": "at infinitely many images",
    "kernel_distance": "kernel distance (KID)",
    "mmd": "Gaussian MMD (as CMMD)",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


def page(
    found: dict[str, Any],
    pictures: dict[str, dict[str, str]] | None = None,
    cards: dict[str, str] | None = None,
    near: dict[str, list[dict[str, Any]]] | None = None,
) -> str:
    """HTML that needs no other file.

    Args:
        pictures: of `samples`.
        cards: of models and datasets, by their name.
        near: of `pairs`.
    """
    marks, people = found["watermark"], found["people"]
    return rendered(
        "judged.html",
        {"number": _number, "percent": _percent, "p": _p},
        found=found,
        level=LEVEL,
        least=LEAST,
        pictures=pictures or {},
        quality_names=QUALITY,
        marks=marks,
        picture=data_uri(svg(watermark(marks["sets"])), "svg+xml") if marks and len(marks["sets"]) > 1 else "",
        cards=cards or {},
        near=near or {},
        questions=TITLES,
        preferred=picture(people) if people else "",
        homogeneity=data_uri(svg(homogeneity(found)), "svg+xml") if found["attributes"] else "",
    )


def samples(config: JudgeConfig, count: int = SHOWN) -> dict[str, dict[str, str]]:
    """Prompt -> model -> the first image of it, as an address; of prompts spread evenly over the set. What does not pass the
    safety rules is grey."""
    found: dict[str, dict[str, str]] = {}
    shown = Safety(config.safety).greyed
    for name, uri in config.models.items():
        reader = Reader(Dataset.open(uri), ["image", "prompt"])
        texts = Reader(Dataset.open(uri), ["prompt"]).gather(np.arange(reader.dataset.header.num_samples))["prompt"]
        prompts, first = np.unique(texts.astype(str), return_index=True)
        chosen = np.unique(np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(int))
        images = shown(reader.gather(first[chosen])["image"])
        for prompt, image in zip(prompts[chosen], images, strict=True):
            found.setdefault(str(prompt), {})[name] = picture_uri(image)
    return found


def pairs(config: JudgeConfig) -> dict[str, list[dict[str, Any]]]:
    """Set -> those of its images that are nearest to a training image, the nearest first: {prompt, ratio, drawn, nearest},
    both images as addresses, grey where one does not pass the safety rules. Sets of a model that saw private data are left
    out: the report would show these."""
    if not config.learned_from or not config.pairs:
        return {}
    known, found, shown = Reader(Dataset.open(config.learned_from), ["image"]), {}, Safety(config.safety).greyed
    for name, uri in {**config.models, **config.attempts}.items():
        dataset, scores = Dataset.open(uri), Dataset.open(f"{config.out}/scores/{name}")
        if dataset.header.provenance.get("private"):
            continue
        of = Reader(scores, ["prompt", "nearest", "nearest_ratio"]).gather(np.arange(scores.header.num_samples))
        first = np.argsort(of["nearest_ratio"], kind="stable")[: config.pairs]
        images = Reader(dataset, ["image"]).gather(first)["image"], known.gather(of["nearest"][first])["image"]
        images = shown(images[0]), shown(images[1])
        found[name] = [
            {"prompt": str(prompt), "ratio": float(ratio), "drawn": picture_uri(own), "nearest": picture_uri(its)}
            for prompt, ratio, own, its in zip(of["prompt"][first], of["nearest_ratio"][first], *images, strict=True)
        ]
    return found


def homogeneity(found: dict[str, Any]) -> Figure:
    """The share of prompts all of whose images are of one kind, over guidance, with what independent draws would give.
    Models are points, those of equal guidance side by side: nothing says that two of them are one model."""
    guidance = {name: value if value is not None else 0.0 for name, value in found["guidance"].items()}
    figure = Figure(figsize=(4.2 * len(found["attributes"]), 3.2), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(found["attributes"]), sharey=True)))
    apart = 0.02 * (np.ptp(list(guidance.values())) or 1.0)
    for axis, (attribute, of) in zip(axes, found["attributes"].items(), strict=True):
        for (name, models), colour in zip(of.items(), cycle(SERIES), strict=False):
            here, alike = [n for n in of if guidance[n] == guidance[name]], models["homogeneous"]
            x = guidance[name] + apart * (here.index(name) - (len(here) - 1) / 2)
            share, by_chance = (np.array(alike[key], float) for key in ("share", "independent"))
            error = np.abs([[share - alike["low"]], [alike["high"] - share]])
            axis.errorbar([x], [share], error, color=colour, marker="o", capsize=3, linestyle="none", label=name)
            axis.plot([x], [by_chance], "_", color="grey", markersize=12)
        axis.set(title=attribute, xlabel="guidance", ylim=(0, 1.02))
    axes[0].plot([], [], "_", color="grey", markersize=12, label="if draws were independent")
    axes[0].set_ylabel("prompts with one kind alone")
    axes[0].legend(frameon=False)
    return figure


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
