"""Accuracy under obfuscations, as Stimberg et al. 2023 measure it: by obfuscation, the mean of several, and of an image the
worst of several, each for the best 1, 3, 5 and 10 guesses."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayproj.errors import UserError
from rayproj.obfuscation.registry import CLEAN, DRAW, HELD_OUT, OBFUSCATIONS, TRAINING

TOP = (1, 3, 5, 10)  # guesses that count
KEPT = max(TOP)
SETS = {"training": TRAINING, "hold-out": HELD_OUT, "all": tuple(OBFUSCATIONS)}


def _dogs() -> tuple[int, ...]:
    """Breeds of dogs, 109 of the 117 classes in a row."""
    return tuple(k for k in range(152, 269) if k not in {192, 204, 227, 242, 251, 258, 260, 264})


# The 16 groups of ImageNet's classes of the conflict stimuli (Geirhos et al. 2019, "ImageNet-trained CNNs are biased towards
# texture"), in the benchmark's order.
CONFLICT_STIMULI: dict[str, tuple[int, ...]] = {
    "airplane": (404,),
    "bear": (294, 295, 296, 297),
    "bicycle": (444, 671),
    "bird": (
        8, *range(10, 17), 18, 19, 20, 22, 23, 24, *range(80, 84), *range(87, 97), 98, 99, 100, *range(127, 134),
        *range(135, 146),
    ),
    "boat": (472, 554, 625, 814, 914),
    "bottle": (440, 720, 737, 898, 899, 901, 907),
    "car": (436, 511, 817),
    "cat": (281, 282, 283, 284, 285, 286),
    "chair": (423, 559, 765, 857),
    "clock": (409, 530, 892),
    "dog": _dogs(),
    "elephant": (385, 386),
    "keyboard": (508, 878),
    "knife": (499,),
    "oven": (766,),
    "truck": (555, 569, 656, 675, 717, 734, 864, 867),
}  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """What a model said of the images of one obfuscation.

    Attributes:
        image: what tells an image, str [n].
        label: int64 [n].
        top: the best guesses, the best first, int64 [n, k].
    """

    image: np.ndarray
    label: np.ndarray
    top: np.ndarray

    def ordered(self) -> Predictions:
        """By image."""
        order = np.argsort(self.image, kind="stable")
        return Predictions(self.image[order], self.label[order], self.top[order])


def best(scores: np.ndarray, count: int = KEPT) -> np.ndarray:
    """The classes of the `count` largest scores, the largest first: int64 [n, count] of [n, classes]. Of equal scores the
    later class comes first, as with the benchmark."""
    return np.argsort(scores, axis=-1, kind="stable")[:, ::-1][:, :count]


def grouped(probabilities: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """[n, groups]: the mean probability of the classes of each group."""
    return np.stack([probabilities[:, list(group)].mean(1) for group in groups], axis=1)


def in_groups(label: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The number of the group that each label is in; -1 of one that is in none."""
    found = np.full(len(label), -1, np.int64)
    for number, group in enumerate(groups):
        found[np.isin(label, list(group))] = number
    return found


def metrics(
    predictions: Mapping[str, Predictions],
    label_weighted: bool = True,
    top: Sequence[int] = TOP,
    among: Collection[str] = tuple(OBFUSCATIONS),
) -> dict[str, float]:
    """The benchmark's metrics under its names: `<obfuscation>-top-<n>`, `mean-` and `worst-` of training, hold-out, all.

    An image counts in the worst case of a set when its label is among the guesses under each obfuscation of the set. Sets of
    which there is only a part are of that part; the clean images are in none.

    Args:
        predictions: of each obfuscation, and of the clean images, of the same images.
        label_weighted: every label counts as much as every other, however many images it has.
        top: numbers of guesses.
        among: obfuscations that means and worst cases are of, where several models do not have the same ones.

    Raises:
        UserError: the obfuscations are of other images, or there are none.
    """
    ordered = {name: p.ordered() for name, p in predictions.items()}
    if not ordered or not len(next(iter(ordered.values())).label):
        raise UserError(
            "There are no predictions to be measured; give some, of images in the class groups if there are any."
        )
    first_name, first = next(iter(ordered.items()))
    for name, p in ordered.items():
        if not (np.array_equal(p.image, first.image) and np.array_equal(p.label, first.label)):
            raise UserError(
                f"The predictions of {name} are of other images or labels than those of {first_name}; make them of the same "
                "images."
            )
    weight = 1 / np.bincount(first.label)[first.label] if label_weighted else np.ones(len(first.label))
    found: dict[str, float] = {}
    for n in top:
        right = {name: (p.top[:, :n] == p.label[:, None]).any(1) for name, p in ordered.items()}
        accuracy = {name: float(np.average(r, weights=weight)) for name, r in right.items()}
        found |= {f"{name}-top-{n}": value for name, value in accuracy.items()}
        for title, names in SETS.items():
            there = [name for name in names if name in right and name in among]
            if there:
                found[f"mean-{title}-top-{n}"] = float(np.mean([accuracy[name] for name in there]))
                every = np.logical_and.reduce([right[name] for name in there])
                found[f"worst-{title}-top-{n}"] = float(np.average(every, weights=weight))
    return found


def intervals(
    predictions: Mapping[str, Predictions],
    label_weighted: bool = True,
    draws: int = 200,
    seed: int = 0,
    among: Collection[str] = tuple(OBFUSCATIONS),
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics for one guess, by a bootstrap over images: all obfuscations of an image go together, and
    all draws of it, `<image>#<draw>`."""
    rng, ordered = np.random.default_rng(seed), {name: p.ordered() for name, p in predictions.items()}
    names = next(iter(ordered.values())).image
    _, which = np.unique([re.sub(rf"{DRAW}\d+$", "", name) for name in names], return_inverse=True)
    drawn, found = [np.flatnonzero(which == k) for k in range(which.max() + 1)], list[dict[str, float]]()
    for _ in range(draws):
        chosen = np.concatenate([drawn[k] for k in rng.integers(0, len(drawn), len(drawn))])
        number = np.arange(len(chosen)).astype(str)
        again = {name: Predictions(number, p.label[chosen], p.top[chosen]) for name, p in ordered.items()}
        found.append(metrics(again, label_weighted, (1,), among))
    return {
        key: (float(low), float(high))
        for key in found[0]
        for low, high in [np.quantile([f[key] for f in found], [0.025, 0.975])]
    }


def csv_of(predictions: Predictions) -> bytes:
    """The benchmark's file of one obfuscation: lines of `image, label, [guesses]`, by image; a comma in a name is quoted."""
    p = predictions.ordered()
    rows = zip(p.image, p.label, p.top, strict=True)
    return "".join(f"{_quoted(image)}, {label}, [{' '.join(map(str, top))}]\n" for image, label, top in rows).encode()


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & {",", '"', "\n"} else text


def read_csv(path: Path) -> Predictions:
    """What `csv_of` or the benchmark's own script wrote.

    Raises:
        UserError: it is not there, or holds something else.
    """
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
        image = np.array([re.sub(r"^b'(.*)'$", r"\1", row[0]) for row in rows])
        label = np.array([int(row[1]) for row in rows], np.int64)
        top = np.array([[int(word) for word in row[2].strip("[] ").split()] for row in rows], np.int64)
    except OSError as error:
        raise UserError(
            f"The predictions '{path}' cannot be read ({error}); give a folder with a CSV of each obfuscation."
        ) from None
    except (ValueError, IndexError) as error:
        raise UserError(f"'{path}' holds no lines of 'image, label, [guesses]' ({error}).") from error
    if not len(rows):
        raise UserError(f"'{path}' holds no predictions.")
    return Predictions(image, label, top.reshape(len(rows), -1))


def read_csvs(folder: str, names: Sequence[str]) -> dict[str, Predictions]:
    """By obfuscation, what a folder has of these, and of the clean images.

    Raises:
        UserError: it has none, or a file cannot be read.
    """
    paths = {name: Path(folder) / f"{name}.csv" for name in [CLEAN, *names]}
    found = {name: read_csv(path) for name, path in paths.items() if path.exists()}
    if not found:
        raise UserError(f"'{folder}' has no predictions such as {next(iter(paths.values())).name}; check the path.")
    return found


def summary(found: dict[str, float], n: int = 1) -> dict[str, Any]:
    """Of the metrics for n guesses: that of the clean images, and the means and worst cases."""
    keys = [f"{CLEAN}-top-{n}", *(f"{kind}-{title}-top-{n}" for title in SETS for kind in ("mean", "worst"))]
    return {key.removesuffix(f"-top-{n}"): found[key] for key in keys if key in found}
