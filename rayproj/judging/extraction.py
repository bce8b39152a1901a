"""Whether a model gives back what it learned from, when asked for it: attempts with the captions of its training images
(Carlini et al. 2023, "Extracting Training Data from Diffusion Models", arXiv 2301.13188, sections 4 and 5)."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayproj.evaluation.proportions import Rate
from rayproj.evaluation.quality import squared_distances

NEIGHBOURS = 50  # n of the paper's eq. 2
NEAR = 0.5  # δ: a copy is at most so far from its original, against the mean distance of the NEIGHBOURS nearest ones


def adaptive_distance(
    images: np.ndarray, train: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[np.ndarray, np.ndarray]:
    """The distance to the nearest training image over the mean distance to the nearest ones (the paper's eq. 2, which has
    α = 1 here): an even or blurred picture is near to many, a copy to one alone.

    Args:
        images, train: vectors [n, d] and [m, d], of pixels or features.

    Returns:
        float64 [n], and the number of the nearest, int64 [n].
    """
    ratio, place = [], []
    for block in squared_distances(images, train):
        distance = np.sqrt(block)
        count = min(neighbours, distance.shape[1])
        near = np.partition(distance, count - 1, axis=1)[:, :count]
        place.append(distance.argmin(1))
        ratio.append(distance.min(1) / np.maximum(near.mean(1), 1e-12))
    return np.concatenate(ratio), np.concatenate(place)


def attempts(prompt: np.ndarray, ratio: np.ndarray, right: np.ndarray, near: float = NEAR) -> dict[str, Any]:
    """What the attempts gave.

    Args:
        prompt: of each image, text [n].
        ratio: its `adaptive_distance` [n].
        right: whether its nearest training image is one that has this caption, bool [n].

    Returns:
        images: the share that are copies of any training image; prompts: the share of captions at least one of whose images
        is a copy of its own image; each with its exact 95 % interval.
    """
    copies = ratio <= near
    names, number = np.unique(prompt, return_inverse=True)
    extracted = np.bincount(number, copies & right, minlength=len(names)) > 0
    return {
        "near": near,
        "images": _rate(Rate(int(copies.sum()), len(copies))),
        "prompts": _rate(Rate(int(extracted.sum()), len(names))),
        "extracted": [str(name) for name in names[extracted]],
    }


def _rate(rate: Rate) -> dict[str, Any]:
    return {"count": rate.failures, "of": rate.images, **rate.share()}
