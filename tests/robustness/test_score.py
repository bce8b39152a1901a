import pytest
import torch

from rayproj.robustness.score import ScoreNetwork, trained_score
from tests.support.linear import digits


def test_at_one_scale_it_is_the_score_of_the_noised_images() -> None:
    """Of N(μ, v) with noise of σ: -(x - μ)/(v + σ²)."""
    generator = torch.Generator().manual_seed(0)
    mean, variance, sigma = 0.4, 0.04, 0.3
    clean = mean + variance**0.5 * torch.randn(2000, 1, 4, 4, generator=generator)
    score = trained_score(clean, 250, sigma, sigma, sigma)
    x = mean + (variance + sigma**2) ** 0.5 * torch.randn(500, 1, 4, 4, generator=generator)
    expected = -(x - mean) / (variance + sigma**2)
    assert (score(x) - expected).square().mean() < 0.07 * expected.square().mean()


def test_over_scales_it_points_from_the_noise_whatever_its_scale() -> None:
    x, _ = digits()
    score, generator = trained_score(x[:500], 150), torch.Generator().manual_seed(0)
    for sigma in (0.15, 0.25, 0.4):
        noise = sigma * torch.randn(x[500:900].shape, generator=generator)
        found = x[500:900] + noise + 0.25**2 * score(x[500:900] + noise)
        assert (found - x[500:900]).square().mean() < 0.8 * sigma**2, sigma


@pytest.mark.parametrize("sides", [(7, 5), (8, 12)])
def test_an_image_of_any_size_has_one(sides: tuple[int, int]) -> None:
    assert ScoreNetwork(3, 0.25)(torch.rand(2, 3, *sides)).shape == (2, 3, *sides)
