"""How often the classifiers of attributes are right on real images, and what the shares that they perceive would be without
their mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.classifiers.model import with_starts
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.accuracy import accuracy
from rayproj.evaluation.models import Examined, ExaminedConfig, open_classifier
from rayproj.evaluation.proportions import Rate
from rayproj.storage.store import Store

DRAWS = 1000
TAILS = (0.025, 0.975)
STEPS, CLOSE = 10_000, 1e-9  # of expectation and maximisation: at most so many, until no share moves further


def opened(model: ExaminedConfig, labelled: str, device: str = "cpu") -> tuple[Examined, Dataset]:
    """A classifier and the real images on which it is tried.

    Raises:
        UserError: it has no such kinds, or learned from these images.
    """
    images = Dataset.open(labelled)
    if Store(model.model).exists("config.yaml") and labelled.rstrip("/") in _learned_from(model.model):
        raise UserError(f"judge.labelled: '{model.model}' learned from '{labelled}'; give images that it has not seen.")
    classifier = open_classifier(model, device)
    if not images.header.classes or "label" not in images.header.fields:
        raise UserError(f"judge.labelled: the images of '{labelled}' have no labels; give ones that have.")
    if lacking := [name for name in images.header.classes if name not in classifier.classes]:
        raise UserError(
            f"judge.labelled: '{labelled}' has the class '{lacking[0]}', and its classifier '{model.model}' only "
            f"{', '.join(classifier.classes[:12])}; give images labelled with these."
        )
    return classifier, images


def _learned_from(run_dir: str) -> set[str]:
    """The datasets of a classifier's run, and of those that it began with."""
    found = set()
    for run in with_starts(run_dir):
        said = Store(run).read("config.yaml")
        found |= {uri.rstrip("/") for uri in (configuration.value(said, "data"), *configuration.value(said, "mix"))}
    return found


def confusion(model: ExaminedConfig, labelled: str, group: str, samples: int, batch: int) -> np.ndarray:
    """int64 [n, K, K], rows the true kinds: of at most so many labelled images, evenly spread, one table each; or of those
    that belong together.

    Args:
        group: the field by which images belong together, such as variants of one figure; "": each is by itself.
    """
    classifier, images = opened(model, labelled)
    if group and group not in images.header.fields:
        raise UserError(
            f"judge.labelled_group: '{labelled}' has no field '{group}'; import it as one of its attributes."
        )
    number = np.array([classifier.classes.index(name) for name in images.header.classes], np.int64)
    rows = np.linspace(0, images.header.num_samples - 1, min(samples, images.header.num_samples)).astype(np.int64)
    reader, size = Reader(images, ["image", "label", *([group] if group else [])]), len(classifier.classes)
    found: dict[Any, np.ndarray] = {}
    for k in range(0, len(rows), batch):
        columns = reader.gather(rows[k : k + batch])
        kind = classifier(torch.from_numpy(columns["image"])).argmax(1).cpu().numpy()
        together = columns[group].tolist() if group else rows[k : k + batch].tolist()
        for of, label, answer in zip(together, columns["label"], kind, strict=True):
            if label >= 0:
                found.setdefault(of, np.zeros((size, size), np.int64))[number[label], answer] += 1
    if not found:
        raise UserError(f"judge.labelled: no image of '{labelled}' has a label; give ones that have.")
    return np.stack(list(found.values()))


def described(tables: np.ndarray, kinds: tuple[str, ...], seed: int = 0) -> dict[str, Any]:
    """Its accuracy with the 95 % interval, and for each kind how often it is recognised; by a percentile bootstrap over what
    belongs together, by Wilson's interval where each image is by itself.

    Args:
        tables: of `confusion` [n, K, K].
    """
    matrix = tables.sum(0)
    recall = {name: Rate(int(matrix[k, k]), int(matrix[k].sum())) for k, name in enumerate(kinds)}
    found = {**accuracy(matrix), "recall": {name: {"of": of.images, **of.share()} for name, of in recall.items()}}
    if len(tables) < found["n"]:
        drawn = _drawn(tables, np.random.default_rng(seed))
        hits, of = np.diagonal(drawn, axis1=1, axis2=2), drawn.sum(2)
        found["groups"] = len(tables)
        found["low"], found["high"] = map(float, np.quantile(hits.sum(1) / of.sum(1), TAILS))
        for k, name in enumerate(kinds):
            if (some := of[:, k] > 0).any():
                low, high = map(float, np.quantile(hits[some, k] / of[some, k], TAILS))
                found["recall"][name] |= {"low": low, "high": high}
    return found


def _drawn(tables: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Confusions [DRAWS, K, K] of as many groups, drawn with replacement."""
    n, size, _ = tables.shape
    return (rng.multinomial(n, np.full(n, 1 / n), DRAWS) @ tables.reshape(n, -1)).reshape(-1, size, size)


def adjusted(kind: np.ndarray, prompt: np.ndarray, tables: np.ndarray, seed: int = 0) -> list[dict[str, float]] | None:
    """For each kind the share that it has if the classifier errs on these images as often as on the labelled ones.

    Its 95 % interval is by a percentile bootstrap over prompts and over labelled images, or groups of these.

    Args:
        kind: perceived, int [n].
        prompt: number or text of each image's prompt [n].
        tables: of `confusion` [groups, K, K].

    Returns:
        {share, low, high} of each; None where the labelled images cannot tell the kinds apart: one of them has none, or some
        are perceived alike.
    """
    matrix = tables.sum(0)
    size, of = len(matrix), matrix.sum(1)
    if not of.all() or np.linalg.matrix_rank(matrix / of[:, None]) < size:
        return None
    _, number = np.unique(prompt, return_inverse=True)
    table = np.bincount(number * size + kind, minlength=(number.max() + 1) * size).reshape(-1, size)
    rng = np.random.default_rng(seed)
    perceived = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), DRAWS) @ table
    again = _drawn(tables, rng)
    whole = again.sum(2).all(1)  # few groups may leave a kind out
    shares = likeliest(table.sum(0), matrix)
    low, high = np.quantile(likeliest(perceived[whole], again[whole]), TAILS, axis=0)
    return [{"share": float(s), "low": float(a), "high": float(b)} for s, a, b in zip(shares, low, high, strict=True)]


def likeliest(perceived: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The shares π [..., K] that make what is perceived likeliest, where j is perceived with probability Σ_i π_i P(j | i).

    Of two kinds they are Rogan and Gladen's (1978), within 0 and 1. Of more by expectation and maximisation, as of prior
    probabilities (Saerens, Latinne and Decaestecker 2002): within the simplex the solution of these equations, else the best
    on its edge.

    Args:
        perceived: number of images of each kind [..., K].
        matrix: of `confusion` [..., K, K], no row empty.
    """
    share = perceived / perceived.sum(-1, keepdims=True)
    given = matrix / matrix.sum(-1, keepdims=True)
    if share.shape[-1] == 2:
        right, wrong = given[..., 0, 0], given[..., 1, 0]
        apart = np.where(right == wrong, np.nan, right - wrong)
        first = np.nan_to_num(np.clip((share[..., 0] - wrong) / apart, 0, 1), nan=0.5)
        return np.stack([first, 1 - first], -1)
    found = np.full(np.broadcast_shapes(share.shape, given.shape[:-1]), 1 / share.shape[-1])
    for _ in range(STEPS):
        chance = np.einsum("...i,...ij->...j", found, given)
        ratio = np.divide(
            share, chance, out=np.zeros_like(chance), where=chance > 0
        )  # what no kind explains tells nothing
        better = found * np.einsum("...ij,...j->...i", given, ratio)
        better /= better.sum(-1, keepdims=True)
        moved, found = np.abs(better - found).max(), better
        if moved < CLOSE:
            break
    return found
