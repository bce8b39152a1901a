"""Rectified flow: a straight path from data to noise (Liu et al. 2023, "Flow Straight and Fast", eq. 1; Esser et al.
2024, "Scaling Rectified Flow Transformers", section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, C, h, w], t [B], label [B]) to the velocity dx/dt [B, C, h, w]."""


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise, for t [B]."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - x0."""
    return noise - x0


class TimeDensity(Enum):
    logit_normal = "logit_normal"  # Esser et al. 2024, "Scaling rectified flow transformers", section 3.1
    uniform = "uniform"
    mixture = "mixture"  # of uniforms, as in Ghalebikesabi et al. 2023, "Differentially private diffusion models ..."


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


class Solver(Enum):
    euler = "euler"  # first order, one evaluation a step
    heun = "heun"  # second order, two evaluations a step


@dataclass
class SamplerConfig:
    """How latents are drawn."""

    steps: int = 16
    solver: Solver = Solver.euler
    guidance: float = 1.5  # 1: the conditional model alone

    def problems(self) -> list[str]:
        return [] if self.steps >= 1 else [f"sampler.steps must be at least 1, not {self.steps}."]


def guided(denoiser: Velocity, null_label: int, guidance: float) -> Velocity:
    """Classifier-free guidance: v = v_null + w (v_label - v_null) (Ho and Salimans 2022, eq. 6 with 1 + their w)."""
    if guidance == 1:
        return denoiser

    def velocity(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([label, torch.full_like(label, null_label)]))
        with_label, without = both.chunk(2)
        return without + guidance * (with_label - without)

    return velocity


@torch.no_grad()
def integrate(velocity: Velocity, noise: Tensor, label: Tensor, config: SamplerConfig) -> Tensor:
    """Solve dx/dt = v(x, t) from t = 1 (noise [B, C, h, w]) to t = 0 in equal steps."""
    x, size = noise, 1.0 / config.steps
    for i in range(config.steps):
        t = torch.full((len(x),), 1 - i * size, device=x.device)
        slope = velocity(x, t, label)
        if config.solver is Solver.heun:
            slope = 0.5 * (slope + velocity(x - size * slope, t - size, label))
        x = x - size * slope
    return x
