"""From noise to latents: solvers of the probability-flow ODE, and guidance.

Solvers see a process by α, σ, x0 and ε alone, so that each works on every path. All that depends on the times is computed on
the host before the loop, in which nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rayproj.diffusion.conditions import Condition, without
from rayproj.diffusion.process import Path, Prediction, Process

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x [B, C, h, w], t [B], condition) to the output [B, C, h, w]."""


class Solver(Enum):
    euler = "euler"  # first order, one evaluation a step; DDIM on the path `cosine` (Song et al. 2021)
    heun = "heun"  # second order, two evaluations a step but the last (Karras et al. 2022, algorithm 1)
    dpmpp_2m = "dpmpp_2m"  # second order of one evaluation: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)
    unipc = "unipc"  # the same with a corrector that costs none: UniPC-2, B2 (Zhao et al. 2023, algorithms 5 and 6)


class Spacing(Enum):
    uniform = "uniform"  # in t
    karras = "karras"  # (σ/α)^(1/7) (Karras et al. 2022, eq. 5)


@dataclass
class SamplerConfig:
    """How latents are drawn."""

    steps: int = 16
    solver: Solver = Solver.euler
    guidance: float = 1.5  # by all conditions together; 1: the conditional model alone
    weights: dict[str, float] = field(default_factory=dict)  # condition -> guidance by it alone, in place of `guidance`
    guide_from: float = 1.0  # guidance at times in (guide_to, guide_from] alone (Kynkäänniemi et al. 2024)
    guide_to: float = 0.0
    spacing: Spacing = Spacing.uniform
    sigma_max: float = 80.0  # σ/α of the first time, for spacing=karras and the path `edm`
    sigma_min: float = 0.002  # of the last before 0, for spacing=karras
    shift: float = 1.0  # factor on σ/α of all times, for larger latents (Esser et al. 2024, eq. 23)
    bf16: bool = False  # the networks, the decoder too: the latents and the solver stay in fp32
    compile: bool = False  # by torch.compile, half a minute once for each sampler; measured 1.26 times as fast on CPU
    graphs: bool = True  # on a GPU, an evaluation is one launch (`Graphs`)

    def problems(self) -> list[str]:
        found = [] if self.steps >= 1 else [f"sampler.steps must be at least 1, not {self.steps}."]
        if not 0 <= self.guide_to < self.guide_from <= 1:
            found.append("sampler.guide_to and guide_from are times with 0 <= guide_to < guide_from <= 1.")
        if not 0 < self.sigma_min < self.sigma_max:
            found.append("sampler.sigma_min and sigma_max: 0 < sigma_min < sigma_max.")
        return found if self.shift > 0 else [*found, f"sampler.shift must be positive, not {self.shift:g}."]


def guided(
    network: Network, config: SamplerConfig, weak: Network | None = None, scales: Tensor | None = None
) -> Network:
    """Guidance away from what is drawn without the condition, or by a weaker model with it.

    out = out_null + w (out_condition - out_null) (Ho and Salimans 2022, eq. 6 with 1 + their w), of any prediction, since
    all of them are linear in x0 at a given x and t. With weights, out_null + Σ w_c (out_c - out_null) of each condition c
    alone (Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models", eq. 11). With `weak`,
    out_null is its output under the condition (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of
    Itself").

    Args:
        scales: w of each sample [B], in the place of the config's.
    """
    if config.guidance == 1 and not config.weights and scales is None:
        return network

    whole = config.guidance if scales is None else scales[:, None, None, None]
    weights: list[float | Tensor] = list(config.weights.values()) or [whole]
    n = len(weights) + 1
    last: list[tuple[Condition, Condition]] = []

    def together(condition: Condition) -> Condition:
        """All that is asked at once; the same object for the same condition."""
        if not last or last[0][0] is not condition:
            parts = [without(condition, keep=[name]) for name in config.weights] or [condition]
            parts.append(without(condition))
            last[:] = [(condition, {name: torch.cat([part[name] for part in parts]) for name in condition})]
        return last[0][1]

    def output(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if weak is not None:
            under, base = network(x, t, condition), weak(x, t, condition)
            return base + whole * (under - base)
        *under_each, base = network(torch.cat([x] * n), torch.cat([t] * n), together(condition)).chunk(n)
        out = base
        for weight, under in zip(weights, under_each, strict=True):
            out = out + weight * (under - base)
        return out

    return output


class Graphs:
    """A network on a GPU whose evaluations are CUDA graphs, one for each shape of what it is given: all its kernels are
    launched at once, where one by one they would keep a small network waiting for the host.

    What it returns is overwritten by the next evaluation of the same shape.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._known: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._held: dict[Any, list[Tensor]] = {}  # the condition that a graph's own copies are of

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        given = [x, t, *condition.values()]
        shape = (*condition, *((tuple(tensor.shape), tensor.dtype) for tensor in given))
        if shape not in self._known:
            self._known[shape] = self._captured([tensor.clone() for tensor in given], list(condition))
        graph, own, out = self._known[shape]
        held, values = self._held.get(shape), given[2:]
        same = held is not None and all(a is b for a, b in zip(held, values, strict=True))
        for copy, tensor in zip(own[: 2 if same else None], given, strict=False):
            copy.copy_(tensor)
        self._held[shape] = values
        graph.replay()
        return out

    def _captured(self, own: list[Tensor], names: list[str]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        x, t, *values = own
        condition = dict(zip(names, values, strict=True))
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # what is made at a first run must not be part of the graph
            for _ in range(2):
                self.network(x, t, condition)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.network(x, t, condition)
        return graph, own, out


def times(config: SamplerConfig, process: Process) -> list[float]:
    """`steps` + 1 times from the noisiest to 0."""
    n = config.steps
    # At t = 1 there is nothing of x0 in x; where that is not finite or no output could tell of x0, the start is just before.
    tells = process.predicts in (Prediction.velocity, Prediction.data, Prediction.v)
    first = 1.0 if process.path is Path.flow and tells else process.time_of(config.sigma_max)
    if config.spacing is Spacing.uniform:
        found = [first * (1 - i / n) for i in range(n)]
    else:
        least, most = process.reach
        low, high = max(config.sigma_min, least) ** (1 / 7), min(config.sigma_max, most) ** (1 / 7)
        found = [process.time_of((high + i / max(1, n - 1) * (low - high)) ** 7) for i in range(n)]
    return [*(process.time_of(config.shift * process.ratio_at(t)) for t in found), 0.0]


def corrected(slope: Tensor, ahead: Tensor, hh: float, r: float) -> Tensor:
    """What UniPC-2's corrector puts in the place of half the slope (Zhao et al. 2023, eq. 9 with B2(h) = e^h - 1).

    Args:
        slope: of x0, over this step, from the time before.
        ahead: the change of x0 to the end of the step, as predicted there.
        hh: -(step in λ).
        r: the step before over this one, negative; 0 in the first step, which has first order.
    """
    if r == 0:
        return 0.5 * ahead
    phi = math.expm1(hh)
    first = (phi / hh - 1) / phi
    second = 2 * ((phi / hh - 1) / hh - 0.5) / phi
    of_slope = (first - second) / (1 - r)
    return of_slope * slope + (first - of_slope) * ahead


@torch.no_grad()
def integrate(network: Network, noise: Tensor, condition: Condition, config: SamplerConfig, process: Process,
              unguided: Network | None = None, x0: Tensor | None = None, begin: float = 1.0) -> Tensor:  # fmt: skip
    """Draw x0 from noise [B, C, h, w].

    Args:
        network: of the process's prediction, with guidance.
        unguided: what takes its place outside of the guidance interval.
        x0: what the noise is added to at the first time, in the place of nothing.
        begin: the share of the path at which it begins.
    """
    grid = [begin * t for t in times(config, process)]
    alphas, sigmas = (v.tolist() for v in process.signal(torch.tensor(grid, dtype=torch.float64)))
    # λ = ln(α/σ); at α = 0 and σ = 0 it is infinite, and what is made of it below has the right limit.
    lambdas = [
        -math.inf if a == 0 else math.inf if s == 0 else math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)
    ]

    def at(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """x0 and ε as the network sees them at time number i."""
        t = torch.full((len(x),), grid[i], dtype=x.dtype, device=x.device)
        inside = config.guide_to < grid[i] <= config.guide_from
        out = (network if inside or unguided is None else unguided)(process.input_of(x, t), t, condition)
        return process.data_and_noise(x, out, t)

    x = sigmas[0] * noise if x0 is None else alphas[0] * x0 + sigmas[0] * noise
    before: Tensor | None = None  # x0 at the time before
    found = at(x, 0)
    for i, j in pairwise(range(config.steps + 1)):
        data, eps = found
        last = j == config.steps
        if config.solver is Solver.euler or config.solver is Solver.heun:
            step = x + (alphas[j] - alphas[i]) * data + (sigmas[j] - sigmas[i]) * eps
            if config.solver is Solver.heun and not last:
                data2, eps2 = at(step, j)
                data, eps = 0.5 * (data + data2), 0.5 * (eps + eps2)
                step = x + (alphas[j] - alphas[i]) * data + (sigmas[j] - sigmas[i]) * eps
        else:
            h = lambdas[j] - lambdas[i]
            decay, gain = sigmas[j] / sigmas[i], -alphas[j] * math.expm1(-h)  # Lu et al. 2022, eq. 14
            slope = torch.zeros_like(data)
            if before is not None and not last:  # by the last step the noise is gone, and first order is exact enough
                slope = (data - before) * (h / (lambdas[i] - lambdas[i - 1]))
            step = decay * x + gain * (data + 0.5 * slope)
            if config.solver is Solver.unipc and not last:
                found = at(step, j)
                r = (lambdas[i - 1] - lambdas[i]) / h if before is not None else 0.0
                step = decay * x + gain * (data + corrected(slope, found[0] - data, -h, r))
        x, before = step, data
        if not last and config.solver is not Solver.unipc:
            found = at(x, j)
    return x
