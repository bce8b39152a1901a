"""How often the classifiers of attributes are right on real images, and what the shares that they perceive would be without
their mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.accuracy import accuracy, confusion_matrix
from rayproj.evaluation.models import Examined, ExaminedConfig, open_classifier
from rayproj.evaluation.proportions import Rate
from rayproj.storage.store import Store

DRAWS = 1000
STEPS, CLOSE = 1000, 1e-6  # of expectation and maximisation: at most so many, until no share moves further


def opened(model: ExaminedConfig, labelled: str, device: str = "cpu") -> tuple[Examined, Dataset]:
    """A classifier and the real images on which it is tried.

    Raises:
        UserError: it has no such kinds, or learned from these images.
    """
    run, images = Store(model.model), Dataset.open(labelled)
    if run.exists("config.yaml") and configuration.value(run.read("config.yaml"), "data").rstrip(
        "/"
    ) == labelled.rstrip("/"):
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


def confusion(model: ExaminedConfig, labelled: str, samples: int, batch: int) -> np.ndarray:
    """int64 [K, K], rows the true kinds, of at most so many labelled images, evenly spread."""
    classifier, images = opened(model, labelled)
    number = np.array([classifier.classes.index(name) for name in images.header.classes], np.int64)
    rows = np.linspace(0, images.header.num_samples - 1, min(samples, images.header.num_samples)).astype(np.int64)
    reader, size = Reader(images, ["image", "label"]), len(classifier.classes)
    found = np.zeros((size, size), np.int64)
    for k in range(0, len(rows), batch):
        columns = reader.gather(rows[k : k + batch])
        labels, known = columns["label"].astype(np.int64), columns["label"] >= 0
        kind = classifier(torch.from_numpy(columns["image"])).argmax(1).cpu().numpy()
        found += confusion_matrix(number[labels[known]], kind[known], size)
    if not found.sum():
        raise UserError(f"judge.labelled: no image of '{labelled}' has a label; give ones that have.")
    return found


def described(matrix: np.ndarray, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Its accuracy with the 95 % interval, and for each kind how often it is recognised."""
    recall = {name: Rate(int(matrix[k, k]), int(matrix[k].sum())) for k, name in enumerate(kinds)}
    return {**accuracy(matrix), "recall": {name: {"of": of.images, **of.share()} for name, of in recall.items()}}


def adjusted(kind: np.ndarray, prompt: np.ndarray, matrix: np.ndarray, seed: int = 0) -> list[dict[str, float]] | None:
    """For each kind the share that it has if the classifier errs on these images as often as on the labelled ones.

    Its 95 % interval is by a percentile bootstrap over prompts and, within each kind, over labelled images.

    Args:
        kind: perceived, int [n].
        prompt: number or text of each image's prompt [n].
        matrix: of `confusion` [K, K].

    Returns:
        {share, low, high} of each; None where the labelled images cannot tell the kinds apart: one of them has none, or some
        are perceived alike.
    """
    size, of = len(matrix), matrix.sum(1)
    if not of.all() or np.linalg.matrix_rank(matrix / of[:, None]) < size:
        return None
    _, number = np.unique(prompt, return_inverse=True)
    table = np.bincount(number * size + kind, minlength=(number.max() + 1) * size).reshape(-1, size)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), DRAWS) @ table
    again = np.stack([rng.multinomial(n, row / n, DRAWS) for n, row in zip(of, matrix, strict=True)], 1)
    shares = likeliest(table.sum(0), matrix)
    low, high = np.quantile(likeliest(drawn, again), [0.025, 0.975], axis=0)
    return [{"share": float(s), "low": float(a), "high": float(b)} for s, a, b in zip(shares, low, high, strict=True)]


def likeliest(perceived: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The shares π [..., K] that make what is perceived likeliest, where j is perceived with probability Σ_i π_i P(j | i).

    By expectation and maximisation, as of prior probabilities (Saerens, Latinne and Decaestecker 2002): within the simplex
    it is the solution of these equations, of two kinds Rogan and Gladen's (1978), and else the best on its edge.

    Args:
        perceived: number of images of each kind [..., K].
        matrix: of `confusion` [..., K, K], no row empty.
    """
    share = perceived / perceived.sum(-1, keepdims=True)
    given = matrix / matrix.sum(-1, keepdims=True)
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
