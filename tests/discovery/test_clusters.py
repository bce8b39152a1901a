"""Failures in clusters: by answer first, then by features."""

import tracemalloc

import numpy as np
import pytest

from rayproj.discovery.clusters import SAMPLE, agreement, clusters, stability


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


def test_agreement_is_the_adjusted_rand_index() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    for _ in range(20):
        one, other = rng.integers(0, 4, 30), rng.integers(0, 3, 30)
        assert agreement(one, other) == pytest.approx(metrics.adjusted_rand_score(one, other), abs=1e-12)
        assert agreement(one, 3 - one) == 1
    assert agreement(np.zeros(5, int), np.zeros(5, int)) == 1


def test_clusters_that_are_there_are_stable_and_others_are_not() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(36, 8))
    assert stability(5 * np.eye(8)[np.arange(36) % 3] + 0.1 * noise) == 1 and stability(noise) < 0.6
    assert np.isnan(stability(noise[:20])), "one cluster"


def test_many_failures_of_one_answer_take_bounded_memory_and_all_get_their_cluster() -> None:
    """Six groups, of which the largest cluster number makes one each; all pairs of so many would be 144 MB."""
    rng, kind = np.random.default_rng(3), np.arange(3 * SAMPLE) % 6
    features = (5 * np.eye(8)[kind] + 0.1 * rng.normal(size=(len(kind), 8))).astype(np.float32)
    tracemalloc.start()
    found = clusters(np.zeros(len(kind), int), features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert agreement(found, kind) == 1 and peak < 80e6
    np.testing.assert_array_equal(found, clusters(np.zeros(len(kind), int), features))
