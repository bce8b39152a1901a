"""Whom a model draws when nobody said: how perceived attributes are distributed over its images, and how often all
images of a prompt are of one kind (Imagen 3, arXiv 2408.07009, section 6.4). What a classifier perceives in a picture
says nothing about a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayproj.evaluation.proportions import Rate


def distribution(kind: np.ndarray, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The share of each kind among the images int [n], with its exact 95 % interval."""
    rates = {name: Rate(int((kind == k).sum()), len(kind)) for k, name in enumerate(kinds)}
    return {name: {"images": rate.failures, **rate.share()} for name, rate in rates.items()}


def homogeneous(kind: np.ndarray, prompt: np.ndarray) -> dict[str, Any]:
    """The share of prompts all of whose images are of one kind, with its exact 95 % interval.

    Beside it is what it would be if every image were drawn by itself from the distribution over all images: Σ_k p_k^m,
    averaged over the numbers m of images of the prompts. More than that says that a prompt decides the kind.

    Args:
        kind: int [n].
        prompt: number or text of each image's prompt [n]; prompts with one image are left out.
    """
    _, number, sizes = np.unique(prompt, return_inverse=True, return_counts=True)
    shares = np.bincount(kind) / max(len(kind), 1)
    one, expected = 0, []
    for k in np.flatnonzero(sizes > 1):
        one += len(np.unique(kind[number == k])) == 1
        expected.append(float((shares ** sizes[k]).sum()))
    rate = Rate(int(one), len(expected))
    by_chance = float(np.mean(expected)) if expected else None
    return {"prompts": rate.images, "homogeneous": rate.failures, **rate.share(), "independent": by_chance}


def outputs(kind: np.ndarray, prompt: np.ndarray, kinds: Sequence[str]) -> dict[str, Any]:
    """Both, of one attribute."""
    return {"distribution": distribution(kind, kinds), "homogeneous": homogeneous(kind, prompt)}
