"""A neural ODE whose equilibria are stable, behind the features of a classifier (Kang et al. 2021, "Stable neural ODE with
Lyapunov-stable equilibrium points for defending against adversarial attacks")."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj.robustness.oracle import OfUnit

Field = Callable[[Tensor], Tensor]
"""dz/dt of states z [B, d]."""


def runge_kutta(field: Field, z: Tensor, end: float, steps: int) -> Tensor:
    """z [B, d] at time `end`, from z at 0, by steps of one length of the classical method of order four; z where there are
    none."""
    for _ in range(steps):
        h = end / steps
        first = field(z)
        second = field(z + h / 2 * first)
        third = field(z + h / 2 * second)
        fourth = field(z + h * third)
        z = z + h / 6 * (first + 2 * second + 2 * third + fourth)
    return z


def regularisers(field: Field, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is small where z [B, d] are equilibria that a field comes back to, each a mean over examples and coordinates:
    fᵢ², exp Jᵢᵢ and exp(Σ_{j≠i} |Jᵢⱼ| + Jᵢᵢ), of the Jacobian J of f at z; the paper's last has -|Jᵢᵢ|, which is the same
    of a negative diagonal. Where that dominates its rows strictly all eigenvalues have negative real parts (Gershgorin),
    as Lyapunov's theorem asks."""
    jacobian = torch.func.vmap(torch.func.jacrev(field))(z)
    diagonal = jacobian.diagonal(dim1=1, dim2=2)
    others = jacobian.abs().sum(2) - diagonal.abs()
    return field(z).square().mean(), diagonal.exp().mean(), (others + diagonal).exp().mean()


def simplex(classes: int, dim: int) -> Tensor:
    """The unit vectors [classes, dim] that are farthest apart, with products of -1/(classes - 1), in directions that are
    drawn.

    Raises:
        ValueError: they need classes - 1 dimensions.
    """
    if dim < classes - 1:
        raise ValueError(f"{classes} corners of a simplex need {classes - 1} dimensions, not {dim}.")
    around = torch.eye(classes) - 1 / classes
    corners = torch.linalg.eigh(around)[1][:, 1:]  # the first is the mean's direction
    turned = nn.init.orthogonal_(torch.empty(dim, classes - 1))
    return (classes / (classes - 1)) ** 0.5 * corners @ turned.T


class StableODE(nn.Module):
    """Takes what the head of a classifier sees to z₀ = P pooled(x) + c, along dz/dt = f(z) to z(`end`), and from there to
    logits by a fixed head V of unit vectors as far apart as they can be. f(z) = sin(-W₃ sin(-W₂ sin(-W₁ z))) with biases, as
    in the published code.

    P and c are such that V z₀ are the logits of the network but for their mean, and what V does not see of z₀ is an
    orthogonal projection of the features: without steps the answer is the network's. (The paper learns P, with an orthogonal
    one in its code, against V.) f learns from clean images alone, by the cross-entropy behind the flow and by regularisers
    that make z₀ stable equilibria of it, with weights of our own.

    Args:
        network: with `pooled`, and an affine `classify`; it stays as it is.
        clean: fp32 [n, C, H, W] in [0, 1], with labels [n].
        steps: of the training.
        dim: of z; at least one less than there are classes.
    """

    seen: Tensor
    label: Tensor

    def __init__(
        self, network: OfUnit, clean: Tensor, label: Tensor, steps: int = 200, dim: int = 32, end: float = 5.0, seed: int = 0
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(seed)
        self.end = end
        with torch.no_grad():
            seen = network.pooled(clean).float()
            bias = network.classify(seen.new_zeros(1, seen.shape[1])).float()
            weight = (network.classify(torch.eye(seen.shape[1]).to(seen)).float() - bias).T
        self.classes = len(weight)
        dim = max(dim, self.classes - 1)
        self.head = simplex(self.classes, dim).to(seen)
        back = (
            (self.classes - 1) / self.classes * self.head.T
        )  # its pseudoinverse, as V Vᵀ is a projection but for that
        rest = nn.init.orthogonal_(torch.empty(dim, seen.shape[1])).to(seen)
        self.matrix, self.offset = back @ weight + rest - back @ self.head @ rest, back @ bias[0]
        self.scale = 1.0
        self.scale = self.start(seen).square().mean().sqrt().item()
        hidden = 4 * dim
        sizes = ((dim, hidden), (hidden, hidden), (hidden, dim))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes).to(seen)
        self.register_buffer("seen", seen)
        self.register_buffer("label", label)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(self.parameters(), lr=3e-3)
        start = self.start(seen)
        with torch.enable_grad():
            for _ in range(steps):
                some = torch.randint(len(start), (64,), generator=generator)
                still, diagonal, dominance = regularisers(self.field, start[some[:16]])  # a Jacobian each
                loss = F.cross_entropy(self.logits(self.flow(start[some], 5)), label[some])
                loss = loss + 10 * still + 3 * (diagonal + dominance)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.requires_grad_(False)

    def start(self, pooled: Tensor) -> Tensor:
        """z₀ [B, dim] of features [B, F]."""
        return (pooled.float() @ self.matrix.T + self.offset) / self.scale

    def field(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = torch.sin(-layer(z))
        return z

    def flow(self, z: Tensor, steps: int) -> Tensor:
        return runge_kutta(self.field, z, self.end, steps)

    def logits(self, z: Tensor) -> Tensor:
        return self.scale * z @ self.head.T

    def likeness(self, pooled: Tensor) -> Tensor:
        """Minus the ℓ1 distance of features [B, F] from those of the nearest clean image of each class, [B, classes]; minus
        infinity of a class without one."""
        distance = torch.cdist(pooled.float(), self.seen, p=1)[:, :, None]
        other = self.label[:, None] != torch.arange(self.classes, device=self.label.device)
        return -distance.masked_fill(other, torch.inf).amin(1)
