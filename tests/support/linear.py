"""Linear classifiers, whose robustness is known exactly, and a small trained network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rayproj.robustness.threats import Norm, Threat


def most_gain(w: np.ndarray, x: np.ndarray, threat: Threat) -> float:
    """max <w, δ> over ‖δ‖ ≤ ε with x + δ in [0, 1], of vectors [d]."""
    size, cap = np.abs(w), np.where(w > 0, 1 - x, x)
    if threat.norm is Norm.linf:
        return float(size @ np.minimum(cap, threat.eps))
    if threat.norm is Norm.l1:  # a continuous knapsack
        left, gain = threat.eps, 0.0
        for i in np.argsort(-size):
            moved = min(left, cap[i])
            left, gain = left - moved, gain + moved * size[i]
        return gain
    low, high = 0.0, 1e9  # δ_i = min(μ |w_i|, cap_i)
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if np.linalg.norm(np.minimum(mid * size, cap)) < threat.eps else (low, mid)
    return float(size @ np.minimum(low * size, cap))


def exactly_robust(
    weight: np.ndarray, bias: np.ndarray, x: np.ndarray, label: np.ndarray, threat: Threat
) -> np.ndarray:
    """bool [n]: the images [n, d] that no perturbation makes a linear classifier [K, d], [K] mistake."""
    found = []
    for one, y in zip(x, label, strict=True):
        margins = [
            (weight[k] - weight[y]) @ one + bias[k] - bias[y] + most_gain(weight[k] - weight[y], one, threat)
            for k in range(len(bias))
            if k != y
        ]
        found.append(max(margins) < 0)
    return np.array(found)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images fp32 [1797, 1, 8, 8] in [0, 1], labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images[:, None] / 16, dtype=torch.float32), torch.tensor(found.target)


def trained(network: nn.Module, x: Tensor, label: Tensor, steps: int = 200) -> nn.Module:
    """By Adam on the cross-entropy of all images at once."""
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x), label).backward()
        optimiser.step()
    return network.eval().requires_grad_(False)


def linear_network(x: Tensor, label: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)), x, label)


def small_network(x: Tensor, label: Tensor) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(x.shape[1], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return trained(nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)), x, label, 120)
