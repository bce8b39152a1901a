"""Diffusion processes: x_t = α(t) x0 + σ(t) ε for times t in [0, 1], and what a network may predict of them.

Every path here reaches the signal-to-noise ratio (α/σ)² of any other at some time, so that they differ in how the input is
scaled, in which times are trained most, and in what the network is asked for (Karras et al. 2022, "Elucidating the Design
Space of Diffusion-Based Generative Models", section 2; Kingma and Gao 2023, arXiv 2303.00848).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Path(Enum):
    """α(t) and σ(t)."""

    flow = "flow"  # 1 - t, t: rectified flow (Liu et al. 2023, "Flow Straight and Fast", eq. 1)
    cosine = "cosine"  # cos(πt/2), sin(πt/2): variance-preserving (Nichol and Dhariwal 2021, eq. 17)
    # Of 1,000 discrete steps, between which ln(σ/α) is linear in t: what weights of others were trained with.
    linear = "linear"  # β from 0.0001 to 0.02 (Ho et al. 2020); DiT
    scaled_linear = "scaled_linear"  # √β from √0.00085 to √0.012; Stable Diffusion
    edm = "edm"  # 1, t / (1 - t): noise is added to the data as they are (Karras et al. 2022)


STEPS = 1000
BETAS = {Path.linear: (1e-4, 0.02), Path.scaled_linear: (0.00085, 0.012)}
DISCRETE = tuple(BETAS)
FIRST = 1e-6  # the time of the first of the discrete steps, before which there is nothing but the clean image


class Prediction(Enum):
    """What the network's output stands for."""

    velocity = "velocity"  # dx_t/dt
    noise = "noise"  # ε (Ho et al. 2020)
    data = "data"  # x0
    v = "v"  # αε - σx0 (Salimans and Ho 2022, "Progressive Distillation", section 4)
    edm = "edm"  # F of x0 = c_skip x + c_out F (Karras et al. 2022, eq. 7), with unit-variance outputs at every time


class TimeDensity(Enum):
    """Of the training times."""

    # Esser et al. 2024, "Scaling rectified flow transformers", section 3.1. On the path `edm`, where t / (1 - t) = σ, it is
    # the log-normal σ of Karras et al. 2022, table 1: time_mean=-1.2, time_std=1.2.
    logit_normal = "logit_normal"
    uniform = "uniform"
    mixture = "mixture"  # of uniforms, as in Ghalebikesabi et al. 2023, "Differentially private diffusion models ..."


@dataclass
class ProcessConfig:
    """Which path, what is predicted, and how the losses of the times are weighted."""

    path: Path = Path.flow
    predicts: Prediction = Prediction.velocity
    min_snr: float = 0.0  # γ of min-SNR weights (Hang et al. 2023, arXiv 2303.09556), 5 in the paper; 0: the plain loss
    sigma_data: float = 1.0  # standard deviation of x0, for the path and the prediction `edm`; latents have 1

    def problems(self) -> list[str]:
        if self.path in DISCRETE and self.predicts is Prediction.velocity:
            return [f"process.predicts=velocity is of smooth paths; with path={self.path.value} choose noise or v."]
        found = [] if self.min_snr >= 0 else [f"process.min_snr must not be negative, but is {self.min_snr:g}."]
        return (
            found if self.sigma_data > 0 else [*found, f"process.sigma_data must be positive, not {self.sigma_data:g}."]
        )


class Process:
    """The formulas of a `ProcessConfig`. Times t [B] are broadcast over x [B, ...]."""

    def __init__(self, config: ProcessConfig) -> None:
        self.config, self.path, self.predicts = config, config.path, config.predicts

    def signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α(t), σ(t)."""
        if self.path is Path.flow:
            return 1 - t, t
        if self.path is Path.cosine:
            return torch.cos(0.5 * math.pi * t), torch.sin(0.5 * math.pi * t)
        if self.path in DISCRETE:
            ratio = torch.where(t > 0, torch.exp(_between(_log_ratios(self.path, t.device), t * STEPS)), 0.0).to(
                t.dtype
            )
            alpha = torch.rsqrt(1 + ratio**2)
            return alpha, alpha * ratio
        return torch.ones_like(t), t / (1 - t)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """dα/dt, dσ/dt."""
        if self.path is Path.flow:
            return -torch.ones_like(t), torch.ones_like(t)
        if self.path is Path.cosine:
            return -0.5 * math.pi * torch.sin(0.5 * math.pi * t), 0.5 * math.pi * torch.cos(0.5 * math.pi * t)
        return torch.zeros_like(t), (1 - t) ** -2

    def time_of(self, ratio: float) -> float:
        """The time at which σ/α is `ratio`."""
        if self.path in DISCRETE:
            table = np.asarray(_log_ratios(self.path, "cpu"))
            return max(FIRST, float(np.interp(math.log(ratio), table, np.arange(STEPS))) / STEPS) if ratio > 0 else 0.0
        if math.isinf(ratio):
            return 1.0
        return 2 / math.pi * math.atan(ratio) if self.path is Path.cosine else ratio / (1 + ratio)

    @property
    def reach(self) -> tuple[float, float]:
        """The least σ/α above 0 that there is, and the greatest."""
        return (self.ratio_at(FIRST), self.ratio_at(1.0)) if self.path in DISCRETE else (0.0, math.inf)

    def ratio_at(self, t: float) -> float:
        """σ/α at a time; infinite at 1."""
        if self.path in DISCRETE:
            alpha, sigma = self.signal(torch.tensor(t, dtype=torch.float64))
            return float(sigma / alpha)
        if t >= 1:
            return math.inf
        return math.tan(0.5 * math.pi * t) if self.path is Path.cosine else t / (1 - t)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        alpha, sigma = _over(x0, *self.signal(t))
        return alpha * x0 + sigma * noise

    def input_of(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is given of x_t: on the path `edm` c_in x, of unit variance at every time."""
        if self.path is not Path.edm:
            return x
        _, sigma = _over(x, *self.signal(t))
        return x * torch.rsqrt(sigma**2 + self.config.sigma_data**2)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict."""
        a, b = _over(x0, *self._weights(t))
        return a * x0 + b * noise

    def data_and_noise(self, x: Tensor, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and ε, from x_t and the network's output: the inverse of (x_t, target) as a linear map of (x0, ε)."""
        alpha, sigma, a, b = _over(x, *self.signal(t), *self._weights(t))
        det = alpha * b - sigma * a
        return (b * x - sigma * out) / det, (alpha * out - a * x) / det

    def weight(self, t: Tensor) -> Tensor:
        """Of the loss at t [B]: 1, or min(SNR, γ) of the loss of x0, as the network's output has it."""
        if not self.config.min_snr:
            return torch.ones_like(t)
        alpha, sigma = self.signal(t)
        a, b = self._weights(t)
        # By `data_and_noise`, an error e of the output is one of σ e / det of x0.
        snr, of_output = (alpha / sigma) ** 2, (sigma / (alpha * b - sigma * a)) ** 2
        return snr.clamp(max=self.config.min_snr) * of_output

    def _weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the target a x0 + b ε."""
        alpha, sigma = self.signal(t)
        if self.predicts is Prediction.velocity:
            return self.slopes(t)
        if self.predicts is Prediction.noise:
            return torch.zeros_like(t), torch.ones_like(t)
        if self.predicts is Prediction.data:
            return torch.ones_like(t), torch.zeros_like(t)
        if self.predicts is Prediction.v:
            return -sigma, alpha
        # F = (x0 - c_skip y) / c_out of y = x0 + σ/α ε; c_skip = d²/(σ²+d²), c_out = σd/√(σ²+d²) with this σ/α.
        ratio, d = sigma / alpha, self.config.sigma_data
        root = torch.sqrt(ratio**2 + d**2)
        return ratio / (d * root), -d / root


def _log_ratios(path: Path, device: Any) -> Tensor:
    """fp64 [STEPS]: ln(σ/α) at each of the discrete steps, of ᾱ = Π (1 - β) (Ho et al. 2020, eq. 4)."""
    low, high = BETAS[path]
    power = 2 if path is Path.scaled_linear else 1
    betas = torch.linspace(low ** (1 / power), high ** (1 / power), STEPS, dtype=torch.float64, device=device) ** power
    logs = torch.log1p(-betas).cumsum(0)
    return 0.5 * (torch.log(-torch.expm1(logs)) - logs)


def _between(table: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation, fp64; at the ends, the ends."""
    place = at.double().clamp(0, len(table) - 1)
    low = place.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[low], table[low + 1], place - low)


def _over(x: Tensor, *of_times: Tensor) -> list[Tensor]:
    """[B] to [B, 1, ...], as many dimensions as x has."""
    return [value.reshape(-1, *[1] * (x.ndim - 1)) for value in of_times]


def mixture_of_uniforms(u: Tensor, pieces: Sequence[Sequence[float]]) -> Tensor:
    """Times by the inverse distribution function: uniform on [low, high] with the given weight, piece by piece.

    Args:
        u: uniforms in [0, 1), of any shape.
        pieces: (low, high, weight) each.
    """
    low, high, weight = torch.tensor(pieces, dtype=torch.float64, device=u.device).T
    ends = (weight / weight.sum()).cumsum(0)
    starts = ends - weight / weight.sum()
    piece = (u.double()[..., None] >= ends[:-1]).sum(-1)
    inside = (u.double() - starts[piece]) / (ends - starts)[piece]
    return (low[piece] + inside * (high - low)[piece]).to(u.dtype)


def logit_normal(normals: Tensor, mean: float, std: float) -> Tensor:
    """Times in (0, 1) whose logit is N(mean, std^2) (Esser et al. 2024, eq. 19), from standard normals."""
    return torch.sigmoid(mean + std * normals)
