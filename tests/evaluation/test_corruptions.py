"""The common corruptions against numpy, scipy, matplotlib and Pillow; keyed, whatever the batch."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

from rayproj.evaluation import corruptions
from rayproj.evaluation.corruptions import CORRUPTIONS, Draw, corrupted
from rayproj.keyed import places


def photographs(count: int = 6, side: int = 32, channels: int = 3) -> Tensor:
    """Pieces of a picture that ships with matplotlib."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    picture = Image.open(path).convert("RGB" if channels == 3 else "L").resize((160, 190))
    array = np.asarray(picture).reshape(190, 160, channels).transpose(2, 0, 1)
    corners = np.random.default_rng(0).integers(0, 160 - side + 1, (count, 2))
    return torch.from_numpy(np.stack([array[:, y : y + side, x : x + side] for y, x in corners]))


def scaled(side: int = 32, channels: int = 3) -> Tensor:
    return photographs(side=side, channels=channels).float() / 255


def draw(name: str, count: int = 6) -> Draw:
    return Draw(places(count), 0, name)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3), (64, 3)])
def test_each_is_keyed_by_the_row_and_worse_when_severe(name: str, side: int, channels: int) -> None:
    x, row = photographs(side=side, channels=channels), places(6) + torch.tensor([9, 0, 0])
    light, severe = corrupted(x, row, name, 1), corrupted(x, row, name, 5)
    assert severe.shape == x.shape and severe.dtype == torch.uint8
    if side == 32:
        some = torch.tensor([4, 1])
        assert torch.equal(corrupted(x[some], row[some], name, 5), severe[some])
        random = not torch.equal(corrupted(x, row, name, 5, seed=1), severe)
        fixed = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
        assert random == (name not in fixed)
    distance = [(y.float() - x.float()).square().mean().sqrt().item() for y in (light, severe)]
    # The severities of the elastic transform trade shifts of the whole for folds in its parts.
    assert (distance[0] < distance[1] or name == "elastic_transform") and 3 < distance[1] < 160


def test_noises_have_their_distributions() -> None:
    grey = torch.full((6, 3, 32, 32), 0.5)
    noise = (corruptions.gaussian_noise(grey, draw("g"), 0.1) - 0.5).flatten().numpy()
    assert stats.kstest(noise / 0.1, "norm").pvalue > 1e-3
    found = corruptions.impulse_noise(grey, draw("i"), 0.07)
    for value in (0.0, 1.0):
        assert (found == value).float().mean() == pytest.approx(0.035, abs=0.004)
    assert ((found == 0.5) | (found == 0) | (found == 1)).all()


@pytest.mark.parametrize("photons", [50, 500])
def test_shot_noise_is_the_quantile_of_a_poisson_variable(photons: int) -> None:
    x, d = scaled(), draw("s")
    u = d.uniform("photons", *x.shape[1:]).double().numpy()
    expected = stats.poisson.ppf(np.maximum(u, 1e-12), (x * 255).round().double().numpy() / 255 * photons)
    found = corruptions.shot_noise(x, d, photons)
    np.testing.assert_allclose(found.numpy() * photons, np.maximum(expected, 0), atol=1e-3)


@pytest.mark.parametrize("sigma", [0.25, 0.7, 2.0])
def test_the_gaussian_blur_is_scipys(sigma: float) -> None:
    x = scaled()
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
    np.testing.assert_allclose(corruptions.blurred(x, sigma), expected, atol=1e-5)


@pytest.mark.parametrize("parameters", CORRUPTIONS["defocus_blur"][1])
def test_defocus_is_a_softened_disk(parameters: tuple[float, float]) -> None:
    radius, alias = parameters
    x, place = scaled(), np.mgrid[-4:5, -4:5]
    disk = (place[0] ** 2 + place[1] ** 2 <= radius**2).astype(float)
    soft = np.exp(-np.array([1, 0, 1]) / (2 * alias**2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(soft, soft) / soft.sum() ** 2, mode="constant")
    expected = ndimage.correlate(x.numpy(), kernel[None, None], mode="mirror")
    np.testing.assert_allclose(corruptions.defocus_blur(x, draw("d"), parameters), expected, atol=1e-5)


def test_glass_moves_pixels_to_near_places() -> None:
    """Without the blurs it is a permutation of each image's pixels, all channels together."""
    height = width = 32
    numbered = torch.arange(height * width).float().view(1, 1, height, width).repeat(4, 3, 1, 1) / 255 / 8
    x = (numbered * 255).floor() / 255
    found = corruptions.glass_blur(x.clone(), draw("g", 4), (0.05, 1, 2))
    assert (found != x).float().mean() > 0.2
    for image, before in zip(found, x, strict=True):
        assert torch.equal(image[0].flatten().sort().values, before[0].flatten().sort().values)
        assert torch.equal(image[0], image[1])
    assert not torch.equal(found[0], found[1])


def test_a_trail_is_half_of_a_gaussian() -> None:
    x = scaled()
    weights = np.exp(-(np.arange(17) ** 2) / (2 * 2.0**2))
    weights[weights / weights.sum() <= 1e-4] = 0
    right = ndimage.correlate1d(x.numpy(), np.r_[np.zeros(16), weights / weights.sum()], axis=3, mode="mirror")
    np.testing.assert_allclose(corruptions.trailed(x, 8, 2.0, torch.zeros(6)), right, atol=1e-3)
    down = corruptions.trailed(x, 8, 2.0, torch.full((6,), math.pi / 2))
    np.testing.assert_allclose(
        down.transpose(2, 3), corruptions.trailed(x.transpose(2, 3), 8, 2.0, torch.zeros(6)), atol=1e-3
    )


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.75])
def test_zooming_is_scipys(factor: float) -> None:
    x = scaled(side=28, channels=1)
    offset = 13.5 * (1 - 1 / factor)
    expected = [ndimage.affine_transform(i[0], [1 / factor] * 2, [offset] * 2, order=1) for i in x.numpy()]
    np.testing.assert_allclose(corruptions.zoomed(x, factor)[:, 0], expected, atol=1e-4)


def test_zoom_blur_is_a_mean() -> None:
    x = scaled()
    expected = (x + sum(corruptions.zoomed(x, 1 + 0.01 * k) for k in range(6))) / 7
    torch.testing.assert_close(corruptions.zoom_blur(x, draw("z"), 1.06), expected)


def test_brightness_is_of_hsv_and_contrast_about_the_mean() -> None:
    x = scaled()
    hsv = rgb_to_hsv(x.permute(0, 2, 3, 1).numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.2, 0, 1)
    np.testing.assert_allclose(
        corruptions.brightness(x, draw("b"), 0.2).permute(0, 2, 3, 1), hsv_to_rgb(hsv), atol=1e-5
    )
    black = corruptions.brightness(torch.zeros(1, 3, 8, 8), draw("b", 1), 0.2)
    assert torch.equal(black, torch.full_like(black, 0.2))
    mean = x.numpy().mean((2, 3), keepdims=True)
    np.testing.assert_allclose(
        corruptions.contrast(x, draw("c"), 0.4), (x.numpy() - mean) * 0.4 + mean, rtol=1e-5, atol=1e-6
    )


def test_sampling_is_scipys_and_the_elastic_map_its_own_inverse_of_corners() -> None:
    x = scaled(side=28, channels=1)
    source = corruptions.pixels(28, 28) + 6 * torch.rand(6, 28, 28, 2, generator=torch.Generator().manual_seed(0)) - 3
    expected = [ndimage.map_coordinates(i[0], [s[..., 1], s[..., 0]], order=1, mode="mirror")
                for i, s in zip(x.numpy(), source.numpy(), strict=True)]  # fmt: skip
    np.testing.assert_allclose(corruptions.sampled(x, source)[:, 0], expected, atol=1e-4)
    still = corruptions.elastic_transform(x, draw("e"), (0, 0, 0))
    torch.testing.assert_close(still, x, rtol=0, atol=1e-4)
    # A ramp shows where each pixel came from: an affine map of its place.
    ramp = corruptions.pixels(32, 32).permute(2, 0, 1)[None].expand(6, -1, -1, -1) / 31
    inner = corruptions.elastic_transform(ramp, draw("e"), (0, 0, 0.02))[:, :, 6:26, 6:26]
    place = torch.cat([corruptions.pixels(32, 32)[6:26, 6:26].flatten(0, 1), torch.ones(400, 1)], 1)
    for image in inner:
        fit = torch.linalg.lstsq(place, image.flatten(1).T)
        assert (place @ fit.solution - image.flatten(1).T).abs().max() < 1e-4
        assert 0.001 < (fit.solution[:2] * 31 - torch.eye(2)).abs().max() < 0.1


def test_clouds_fill_their_range_and_are_smoother_where_octaves_decay() -> None:
    rough, smooth = (corruptions.plasma(draw("p", 20), decay, 32, 28) for decay in (1.3, 3.0))
    for cloud in (rough, smooth):
        assert cloud.shape == (20, 32, 28)
        assert torch.equal(cloud.amin((1, 2)), torch.zeros(20)) and torch.equal(cloud.amax((1, 2)), torch.ones(20))
    assert 2 * smooth.diff(dim=2).abs().mean() < rough.diff(dim=2).abs().mean()


def test_weather_is_where_it_should_be() -> None:
    x = scaled()
    fog = corruptions.fog(x, draw("f"), (1.0, 2.0))
    assert (fog.amax((1, 2, 3)) <= x.amax((1, 2, 3)) + 1e-6).all(), "fog is no brighter than the brightest"
    assert fog.std((2, 3)).mean() < x.std((2, 3)).mean(), "and takes contrast away"
    dark = torch.zeros(6, 3, 32, 32)
    snow = corruptions.snow(dark, draw("s"), CORRUPTIONS["snow"][1][0])
    white = snow[:, 0] > 0.05 + 0.05 * 0.5
    assert 0.005 < white.float().mean() < 0.5 and torch.equal(snow[:, 0], snow[:, 2])
    frost = corruptions.frost(dark, draw("i"), (1, 0.4))
    assert (frost[:, 2] > frost[:, 0]).all() and frost.max() <= 0.4 and frost.min() >= 0.4 * 0.35 * 0.85 - 1e-6


def test_pillows_own() -> None:
    x = photographs(2)
    found = corrupted(x, places(2), "pixelate", 5)
    small = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((20, 20), Image.Resampling.BOX)
    assert np.array_equal(found[0].permute(1, 2, 0), np.asarray(small.resize((32, 32), Image.Resampling.BOX)))
    grey = corrupted(photographs(2, channels=1), places(2), "jpeg_compression", 5)
    assert grey.shape == (2, 1, 32, 32)
