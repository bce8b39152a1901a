"""Solvers and guidance where the exact answer is known, and beside the schedulers of diffusers."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rayproj.diffusion import sampling
from rayproj.diffusion.conditions import Condition, without
from rayproj.diffusion.process import Path, Prediction, Process, ProcessConfig
from rayproj.diffusion.sampling import SamplerConfig, Solver, Spacing, guided, integrate, times

MEAN, STD = 1.5, 0.4
NATURAL = [(Path.flow, Prediction.velocity), (Path.cosine, Prediction.v), (Path.edm, Prediction.edm)]
NONE: Condition = {}


def unscaled(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """x_t of what the network is given."""
    return x / process.input_of(torch.ones_like(x), t)


def exact(process: Process, mean: float = MEAN, std: float = STD) -> sampling.Network:
    """The best network for x0 ~ N(mean, std²)."""

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = unscaled(process, x, t)
        alpha, sigma = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in process.signal(t))
        noise = sigma / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)  # -σ times the score
        data = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        return process.target(data, noise, t)

    return network


def error(process: Process, config: SamplerConfig) -> float:
    """The flow keeps quantiles: x/α at σ/α = R goes to mean + (x/α - mean) std / sqrt(std² + R²)."""
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None, None, None]
    found = integrate(exact(process), noise, NONE, config, process)
    ratio = process.ratio_at(times(config, process)[0])
    start = STD * noise if math.isinf(ratio) else (ratio * noise - MEAN) * STD / math.hypot(STD, ratio)
    return (found - MEAN - start).square().mean().sqrt().item()


@pytest.mark.parametrize(("path", "predicts"), NATURAL)
@pytest.mark.parametrize("solver", Solver)
def test_solvers_converge_at_their_order(solver: Solver, path: Path, predicts: Prediction) -> None:
    process = Process(ProcessConfig(path, predicts))
    # Multistep solvers take even steps in ln(α/σ) for granted, which `uniform` has not near t = 1.
    even = path is not Path.flow or solver in (Solver.dpmpp_2m, Solver.unipc)
    spacing = Spacing.karras if even else Spacing.uniform
    low, high = (0.9, 1.1) if solver is Solver.euler else (1.9, 2.4)
    if solver is Solver.unipc:
        high = 3.6  # its corrector looks ahead, and on a Gaussian that is worth nearly an order
    errors = [error(process, SamplerConfig(steps, solver, spacing=spacing)) for steps in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert low < math.log2(coarse / fine) < high


@pytest.mark.parametrize("predicts", Prediction)
def test_what_is_predicted_does_not_matter_to_a_sampler(predicts: Prediction) -> None:
    config = SamplerConfig(20, Solver.dpmpp_2m, spacing=Spacing.karras)
    assert error(Process(ProcessConfig(Path.flow, predicts)), config) < 0.03


def net(x: Any, t: Any) -> Any:
    """Some function of both."""
    return torch.tanh(0.7 * x + t) * (1 + 0.3 * torch.cos(2 * x))


def drawn(process: Process, solver: Solver, grid: list[float], noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sampling, "times", lambda config, process: grid)
    of_time: Callable[[Tensor], Tensor] = lambda t: t.reshape(-1, 1, 1, 1)  # noqa: E731
    config = SamplerConfig(len(grid) - 1, solver)
    return integrate(lambda x, t, condition: net(x, of_time(t)), noise, NONE, config, process)


def test_euler_on_a_flow_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler()
    process = Process(ProcessConfig())
    grid = times(SamplerConfig(7, shift=3.0), process)
    scheduler.set_timesteps(sigmas=grid[:-1])
    x = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(net(x, sigma), t, x).prev_sample
    torch.testing.assert_close(drawn(process, Solver.euler, grid, noise, monkeypatch), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_euler_on_a_variance_preserving_path_is_ddim(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    predicts = {"v_prediction": Prediction.v, "epsilon": Prediction.noise, "sample": Prediction.data}[prediction]
    process = Process(ProcessConfig(Path.cosine, predicts))
    ratios = [((1 - a) / a) ** 0.5 for a in scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist()]
    grid = [*(process.time_of(ratio) for ratio in ratios), 0.0]
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = noise * process.signal(torch.tensor(grid[0], dtype=torch.float64))[1]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(net(x, grid[i]), t, x).prev_sample
    found = drawn(process, Solver.euler, grid, noise, monkeypatch)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Solver.euler, Solver.dpmpp_2m])
def test_on_the_path_edm_it_is_diffusers(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    kind = EDMEulerScheduler if solver is Solver.euler else EDMDPMSolverMultistepScheduler
    scheduler = kind(sigma_min=0.01, sigma_max=50.0, sigma_data=0.5)
    scheduler.set_timesteps(9)
    process = Process(ProcessConfig(Path.edm, Prediction.edm, sigma_data=0.5))
    grid = times(SamplerConfig(9, spacing=Spacing.karras, sigma_min=0.01, sigma_max=50.0), process)
    assert [process.ratio_at(t) for t in grid] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = noise * grid[0] / (1 - grid[0])
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(net(scheduler.scale_model_input(x, t), grid[i]), t, x).prev_sample
    found = drawn(process, solver, grid, noise, monkeypatch)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [Solver.dpmpp_2m, Solver.unipc])
def test_multistep_solvers_on_a_flow_are_diffusers(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    scheduler: Any = (
        UniPCMultistepScheduler(**options) if solver is Solver.unipc else DPMSolverMultistepScheduler(**options)
    )
    scheduler.set_timesteps(20)
    grid = scheduler.sigmas.double().tolist()
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = grid[0] * noise
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(net(x, grid[i]), t, x).prev_sample
    found = drawn(Process(ProcessConfig()), solver, grid, noise, monkeypatch)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def by_label(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The label, and 5 where there is none."""
    label = condition["label"]
    return x * 0 + torch.where(label < 0, 5, label)[:, None, None, None].to(x)


def test_guidance_extrapolates_from_no_condition() -> None:
    x, t, label = torch.zeros(3, 1, 2, 2), torch.zeros(3), torch.tensor([0, 1, 2])
    assert guided(by_label, SamplerConfig(guidance=1.0)) is by_label
    found = guided(by_label, SamplerConfig(guidance=2.5))(x, t, {"label": label})[:, 0, 0, 0]
    torch.testing.assert_close(found, 5 + 2.5 * (label - 5.0))
    by_weak = guided(by_label, SamplerConfig(guidance=2.5), weak=lambda x, t, c: by_label(x, t, c) - 1)
    torch.testing.assert_close(by_weak(x, t, {"label": label})[:, 0, 0, 0], label + 1.5)


def test_conditions_have_weights_of_their_own() -> None:
    """Of a Gaussian whose mean each condition shifts: the guided mean is that of the weighted shifts, in closed form; and
    one weight alone is ordinary guidance by that condition."""
    process, shift = Process(ProcessConfig(Path.flow, Prediction.data)), {"label": 0.7, "style": -0.4}

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x0 given x of N(mean, 1)."""
        mean = sum((condition[n] >= 0) * shift[n] * (condition[n] + 1) for n in shift)
        t, mean = t.reshape(-1, 1, 1, 1), torch.as_tensor(mean).to(x).reshape(-1, 1, 1, 1)
        return mean + (1 - t) / ((1 - t) ** 2 + t**2) * (x - (1 - t) * mean)

    condition = {"label": torch.tensor([0, 1, -1]), "style": torch.tensor([2, -1, 0])}
    x, t = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    found = guided(network, SamplerConfig(weights={"label": 2.0, "style": 0.5}))(x, t, condition)
    mean = 2.0 * 0.7 * torch.tensor([1.0, 2.0, 0.0]) + 0.5 * -0.4 * torch.tensor([3.0, 0.0, 1.0])
    gain = (t**2 / ((1 - t) ** 2 + t**2))[:, None, None, None]
    base = network(x, t, without(condition))
    torch.testing.assert_close(found, base + gain * mean.double()[:, None, None, None])
    assert process.predicts is Prediction.data
    alone = guided(network, SamplerConfig(weights={"style": 3.0}))(x, t, condition)
    torch.testing.assert_close(
        alone, guided(network, SamplerConfig(guidance=3.0))(x, t, without(condition, keep=["style"]))
    )


def test_guidance_of_a_mixture_is_the_score_of_its_tilted_density() -> None:
    """Of two classes N(±m, s²) of equal weight: the guided noise is -σ times the gradient of log p(x) + w log p(y|x)."""
    mean, std, w, process = 1.0, 0.5, 3.0, Process(ProcessConfig(Path.flow, Prediction.noise))

    def log_p(x: Tensor, t: Tensor, sign: float) -> Tensor:
        return -0.5 * (x - (1 - t) * sign * mean) ** 2 / ((1 - t) ** 2 * std**2 + t**2)

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x, at = x.clone().requires_grad_(True), t.reshape(-1, 1, 1, 1)
        both = torch.stack([log_p(x, at, 1.0), log_p(x, at, -1.0)])
        chosen = torch.where(condition["label"].reshape(-1, 1, 1, 1) < 0, both.logsumexp(0), both[0])
        return -at * torch.autograd.grad(chosen.sum(), x)[0]

    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    t, label = torch.full((9,), 0.4, dtype=torch.float64), torch.zeros(9).long()
    found = guided(network, SamplerConfig(guidance=w))(x, t, {"label": label})
    y = x.clone().requires_grad_(True)
    p = torch.stack([log_p(y, t[:, None, None, None], 1.0), log_p(y, t[:, None, None, None], -1.0)])
    tilted = p.logsumexp(0) + w * (p[0] - p.logsumexp(0))
    expected = -0.4 * torch.autograd.grad(tilted.sum(), y)[0]
    torch.testing.assert_close(found, expected)
    assert (process.data_and_noise(x, found, t)[1] - expected).abs().max() < 1e-12


def test_guidance_within_an_interval_alone() -> None:
    seen: dict[str, list[float]] = {"guided": [], "plain": []}

    def network(name: str) -> sampling.Network:
        return lambda x, t, condition: (seen[name].append(t[0].item()), x * 0)[1]

    config = SamplerConfig(10, guide_from=0.75, guide_to=0.35)
    integrate(network("guided"), torch.zeros(2, 1, 2, 2), NONE, config, Process(ProcessConfig()), network("plain"))
    assert seen["guided"] == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert len(seen["guided"]) + len(seen["plain"]) == 10


@pytest.mark.parametrize("solver", Solver)
def test_an_evaluation_a_step(solver: Solver) -> None:
    calls = []
    network = lambda x, t, condition: (calls.append(1), x * 0)[1]  # noqa: E731
    integrate(network, torch.zeros(2, 1, 2, 2), NONE, SamplerConfig(10, solver), Process(ProcessConfig()))
    assert len(calls) == (19 if solver is Solver.heun else 10)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"shift": 0.0}, {"guide_from": 0.2, "guide_to": 0.3}, {"sigma_min": 90.0}]
)
def test_what_no_sampler_can_be_made_of(wrong: dict[str, Any]) -> None:
    assert len(SamplerConfig(**wrong).problems()) == 1 and SamplerConfig().problems() == []
