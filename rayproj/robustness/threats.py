"""What an attacker may do to an image: move it by at most ε in an ℓp norm, inside [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from rayproj import keyed
from rayproj.kernels import ascent


class Norm(Enum):
    linf = "linf"
    l2 = "l2"
    l1 = "l1"


@dataclass(frozen=True)
class Threat:
    """An ℓp ball around each image [C, H, W] in [0, 1], cut at the box."""

    norm: Norm = Norm.linf
    eps: float = 8 / 255

    def problems(self) -> list[str]:
        return [] if self.eps >= 0 else [f"threat.eps must not be negative, not {self.eps:g}."]

    def __str__(self) -> str:
        return f"{self.norm.value} {self.eps:.4g}"

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Points [B, C, H, W] brought into the ball around `x` and the box; exactly the nearest ones for ℓ∞ and ℓ1, and for
        ℓ2 first onto the ball and then onto the box, which is inside both."""
        if self.norm is Norm.l1:
            return x + project_l1(z - x, x, self.eps)
        return ascent.projected(x, z, self.eps, self.norm is Norm.l2)  # type: ignore[no-any-return]

    def ascend(
        self, x: Tensor, point: Tensor, before: Tensor, gradient: Tensor, step: Tensor, momentum: float = 1.0
    ) -> Tensor:
        """The next points of a projected ascent in ℓ∞ or ℓ2, as `kernels.ascent.move` has it; in one kernel on a GPU."""
        assert self.norm is not Norm.l1
        move = ascent.move
        if x.is_cuda and x.dtype is torch.float32:
            from rayproj.kernels import ascent_triton  # Triton comes with PyTorch's CUDA builds alone

            move = ascent_triton.move
        return move(x, point, before, gradient, step, self.eps, momentum, self.norm is Norm.l2)  # type: ignore[no-any-return]

    def start(self, x: Tensor, row: Tensor, seed: int) -> Tensor:
        """A random point of each ball, keyed by (seed, row); rows [B, 3] are (example, restart, attack)."""
        if self.norm is Norm.linf:
            t = 2 * keyed.uniform(seed, "start", row, tuple(x.shape[1:])) - 1
            return self.project(x, x + self.eps * t / wide(size(t, Norm.linf), t))
        t = keyed.normal(seed, "start", row, tuple(x.shape[1:]))
        if self.norm is Norm.l2:
            return self.project(x, x + self.eps * t / wide(size(t, Norm.l2), t))
        return self.project(x, x + t)

    def holds(self, x: Tensor, z: Tensor, tolerance: float = 1e-5) -> Tensor:
        """bool [B]: whether points are numbers inside the ball and the box, but for rounding."""
        near = size(z - x, self.norm) <= self.eps * (1 + tolerance) + tolerance
        inside = ((z >= -tolerance) & (z <= 1 + tolerance)).flatten(1).all(1)
        return near & inside & z.isfinite().flatten(1).all(1)


def size(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of each example: [B, ...] to [B]."""
    flat = delta.flatten(1)
    if norm is Norm.linf:
        return flat.abs().amax(1)
    return flat.norm(dim=1) if norm is Norm.l2 else flat.abs().sum(1)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """[B] to [B, 1, ...] with as many axes as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def room(x: Tensor, direction: Tensor) -> Tensor:
    """How far each value of `x` can move towards the sign of `direction` before it leaves [0, 1]."""
    return torch.where(direction > 0, 1 - x, x)


def project_l1(u: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest perturbations [B, ...] to `u` of ℓ1 norm at most `eps` with x + δ in [0, 1] (Croce and Hein 2021, "Mind
    the box", prop. 2.1).

    |δ_i| = clamp(|u_i| - λ, 0, room_i); the λ ≥ 0 at which they sum to `eps` is found exactly, the sum being linear between
    the sorted |u_i| and |u_i| - room_i.
    """
    flat, cap = u.flatten(1).abs().double(), room(x, u).flatten(1).double()
    knots = torch.cat([flat, (flat - cap).clamp(min=0)], 1)
    slopes = torch.cat([torch.ones_like(flat), -torch.ones_like(flat)], 1)
    knots, order = knots.sort(1, descending=True)
    slopes = slopes.gather(1, order)
    weight, mass = slopes.cumsum(1), (slopes * knots).cumsum(1)
    # Between knot k and the next, Σ clamp(|u| - λ, 0, room) = mass_k - weight_k λ.
    at_next = mass - weight * torch.cat([knots[:, 1:], torch.zeros_like(knots[:, :1])], 1)
    segment = (at_next < eps).sum(1, keepdim=True).clamp(max=knots.shape[1] - 1)
    shift = (mass.gather(1, segment) - eps) / weight.gather(1, segment).clamp(min=1)
    found = torch.minimum((flat - shift.clamp(min=0)).clamp(min=0), cap)
    return (found.to(u) * u.flatten(1).sign()).view_as(u)
