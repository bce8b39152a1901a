"""Failures in clusters: by answer first, then by features."""

import numpy as np

from rayproj.discovery.clusters import clusters


def test_clusters_are_of_one_answer_and_of_what_looks_alike() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3)[[0] * 20 + [1] * 20 + [2] * 10]
    features = (5 * centres + 0.1 * rng.normal(size=(50, 3))).astype(np.float32)
    answers = np.array([7] * 40 + [3] * 10)
    order = rng.permutation(50)
    found = np.empty(50, int)
    found[order] = clusters(answers[order], features[order])
    assert not set(found[:20]) & set(found[20:40]) and not set(found[:40]) & set(found[40:])
    assert sorted(set(found)) == list(range(len(set(found))))


def test_without_features_the_answer_counts() -> None:
    assert clusters(np.array([5, 2, 5, 9]), None).tolist() == [1, 0, 1, 2]
    assert len(clusters(np.array([], int), None)) == 0
