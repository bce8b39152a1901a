"""Processes and predictions: identities that hold for every pair of them, published weights, and the exact risk."""

import math

import pytest
import torch

from rayproj.diffusion.process import (
    DISCRETE,
    Path,
    Prediction,
    Process,
    ProcessConfig,
    logit_normal,
    mixture_of_uniforms,
)

PAIRS = [(path, predicts) for path in Path for predicts in Prediction]

SMOOTH = [path for path in Path if path not in DISCRETE]


def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x0, noise, torch.rand(64, generator=generator, dtype=torch.float64) * 0.96 + 0.02


@pytest.mark.parametrize(("path", "predicts"), PAIRS)
def test_data_and_noise_come_back_from_what_is_predicted(path: Path, predicts: Prediction) -> None:
    process = Process(ProcessConfig(path, predicts, sigma_data=0.7))
    x0, noise, t = draws()
    x = process.noised(x0, noise, t)
    found = process.data_and_noise(x, process.target(x0, noise, t), t)
    torch.testing.assert_close(found, (x0, noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", SMOOTH)
def test_the_velocity_is_the_paths_derivative(path: Path) -> None:
    process, (x0, noise, t), h = Process(ProcessConfig(path)), draws(), 1e-6
    t = t * 0.9
    slope = (process.noised(x0, noise, t + h) - process.noised(x0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, process.target(x0, noise, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", SMOOTH)
def test_times_and_ratios_are_inverse(path: Path) -> None:
    process = Process(ProcessConfig(path))
    for ratio in (0.002, 0.3, 1.0, 80.0):
        assert process.ratio_at(process.time_of(ratio)) == pytest.approx(ratio)
        alpha, sigma = process.signal(torch.tensor([process.time_of(ratio)], dtype=torch.float64))
        assert (sigma / alpha).item() == pytest.approx(ratio)
    assert process.time_of(math.inf) == 1.0 and process.ratio_at(1.0) == math.inf


def test_the_path_edm_is_that_of_the_paper() -> None:
    """Karras et al. 2022, table 1: c_in, c_skip, c_out, and λ c_out² = 1."""
    d = 0.5
    process = Process(ProcessConfig(Path.edm, Prediction.edm, sigma_data=d))
    x0, noise, t = draws()
    x, out = process.noised(x0, noise, t), torch.randn_like(x0)
    sigma = (t / (1 - t))[:, None, None, None]
    torch.testing.assert_close(x, x0 + sigma * noise)
    torch.testing.assert_close(process.input_of(x, t), x / (sigma**2 + d**2).sqrt())
    skip, of_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
    torch.testing.assert_close(process.data_and_noise(x, out, t)[0], skip * x + of_out * out)
    assert torch.equal(process.weight(t), torch.ones_like(t))


def test_with_data_of_unit_variance_the_networks_of_edm_and_v_are_one() -> None:
    x0, noise, t = draws()
    vp = Process(ProcessConfig(Path.cosine, Prediction.v))
    edm = Process(ProcessConfig(Path.edm, Prediction.edm))
    same = torch.tensor([edm.time_of(vp.ratio_at(one)) for one in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(edm.target(x0, noise, same), -vp.target(x0, noise, t))
    torch.testing.assert_close(edm.input_of(edm.noised(x0, noise, same), same), vp.noised(x0, noise, t))


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """Hang et al. 2023: min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, min(SNR, γ) for x0."""
    t = draws()[2]
    snr = (torch.cos(0.5 * math.pi * t) / torch.sin(0.5 * math.pi * t)) ** 2
    clipped = snr.clamp(max=5.0)
    for predicts, expected in (
        (Prediction.noise, clipped / snr), (Prediction.v, clipped / (snr + 1)), (Prediction.data, clipped),
    ):  # fmt: skip
        found = Process(ProcessConfig(Path.cosine, predicts, min_snr=5.0)).weight(t)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("path", "predicts"), PAIRS)
def test_the_weighted_loss_of_any_prediction_is_that_of_the_data(path: Path, predicts: Prediction) -> None:
    process = Process(ProcessConfig(path, predicts, min_snr=5.0, sigma_data=0.7))
    x0, noise, t = draws()
    x, out = process.noised(x0, noise, t), torch.randn_like(x0)
    ours = process.weight(t) * (out - process.target(x0, noise, t)).square().flatten(1).mean(1)
    alpha, sigma = process.signal(t)
    of_data = (process.data_and_noise(x, out, t)[0] - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, (alpha / sigma).square().clamp(max=5.0) * of_data)


@pytest.mark.parametrize(("path", "predicts"), PAIRS)
def test_the_exact_denoiser_has_the_bayes_risk(path: Path, predicts: Prediction) -> None:
    """Of x0 ~ N(m, s²), the posterior variance of x0 is s²σ²/(α²s² + σ²); any prediction's risk is a multiple of it."""
    mean, std = 0.4, 0.6
    process = Process(ProcessConfig(path, predicts, min_snr=5.0))
    t = torch.full((400_000,), 0.37, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x0 = mean + std * torch.randn(400_000, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(400_000, 1, generator=generator, dtype=torch.float64)
    alpha, sigma = (value[:, None] for value in process.signal(t))
    x = process.noised(x0, noise, t)
    data = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
    out = process.target(data, (x - alpha * data) / sigma, t)
    risk = (process.weight(t) * (out - process.target(x0, noise, t)).square()[:, 0]).mean()
    variance = std**2 * sigma[0] ** 2 / (alpha[0] ** 2 * std**2 + sigma[0] ** 2)
    expected = min(5.0, (alpha[0] / sigma[0]).item() ** 2) * variance.item()
    assert risk.item() == pytest.approx(expected, rel=0.01)


def test_times_have_a_normal_logit() -> None:
    normals = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(logit_normal(normals, 0.3, 2.0)), 0.3 + 2.0 * normals)


def test_a_mixture_of_uniforms_has_its_weights_and_is_uniform_within() -> None:
    from scipy import stats

    pieces = [[0.0, 0.03, 1.5], [0.03, 0.6, 78.5], [0.7, 1.0, 20.0]]
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = mixture_of_uniforms(u, pieces)
    for low, high, weight in pieces:
        inside = times[(times >= low) & (times < high)]
        assert abs(len(inside) / len(u) - weight / 100) < 5 * math.sqrt(weight / 100 / len(u))
        assert stats.kstest(((inside - low) / (high - low)).numpy(), "uniform").pvalue > 1e-3
    assert not ((times > 0.6) & (times < 0.7)).any()
    assert torch.equal(mixture_of_uniforms(u, [[0.0, 1.0, 3.0]]), u)
