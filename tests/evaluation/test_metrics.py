"""Metrics against closed forms, scipy and naive loops."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy import stats

from rayproj.evaluation.accuracy import accuracy, confusion_matrix, wilson_interval
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.frechet import FeatureStatistics, frechet_distance


def test_confusion_is_a_count_and_parts_add_up() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    matrix = confusion_matrix(labels, predictions, 4)
    for i in range(4):
        for j in range(4):
            assert matrix[i, j] == sum((a, b) == (i, j) for a, b in zip(labels, predictions, strict=True))
    parts = confusion_matrix(labels[:77], predictions[:77], 4) + confusion_matrix(labels[77:], predictions[77:], 4)
    assert np.array_equal(parts, matrix)
    assert accuracy(matrix)["value"] == (labels == predictions).mean()


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (5, 10), (727, 1000), (10, 10)])
def test_the_interval_is_wilsons(correct: int, total: int) -> None:
    expected = stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_frechet_distance_is_the_closed_form_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 0.5
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(expected, rel=1e-9)
    shifted = FeatureStatistics.of(a + 3.0)
    assert frechet_distance(FeatureStatistics.of(a), shifted) == pytest.approx(9 * 6, rel=1e-6)
    scaled = FeatureStatistics.of((a - a.mean(0)) * 2 + a.mean(0))
    assert frechet_distance(FeatureStatistics.of(a), scaled) == pytest.approx(np.trace(s1), rel=1e-6)


def test_statistics_of_parts_add_up_and_singular_ones_are_fine() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 64)), rng.normal(size=(40, 64))
    whole = FeatureStatistics.of(x)
    parts = FeatureStatistics.of(x[:13]) + FeatureStatistics.of(x[13:])
    other = FeatureStatistics.of(y)
    assert frechet_distance(parts, other) == pytest.approx(frechet_distance(whole, other), rel=1e-9)
    assert frechet_distance(whole, whole) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(whole, other) == pytest.approx(frechet_distance(other, whole), rel=1e-6)


def test_the_feature_network_knows_what_it_sees() -> None:
    """Grace Hopper in uniform, a picture that ships with matplotlib: ImageNet class 652 is "military uniform"."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
    extractor = EfficientNetLite0Features(224)
    assert extractor.logits(image[:, :, :512]).argmax().item() == 652
    features = extractor(image)
    assert features.shape == (1, 1280) and features.min() > -0.5
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
