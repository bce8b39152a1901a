"""References of `norms_triton`: normalisations with what comes after them, and the update of a sampler under guidance. Plain
torch, differentiable by autograd.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift, as adaptive layer norm has it (Peebles and Xie 2023, "Scalable Diffusion Models with
    Transformers", section 3.2).

    Args:
        x: [B, T, D].
        shift, scale: [B, D].
    """
    normal = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normal * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(x.dtype)


def gated_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The residual r = x + gate h, and `layer_norm_modulate` of it: what lies between two layers of a block.

    Args:
        x, h: [B, T, D].
        gate, shift, scale: [B, D].
    """
    r = (x.float() + gate.float()[:, None] * h.float()).to(x.dtype)
    return r, layer_norm_modulate(r, shift, scale, eps)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """SiLU of GroupNorm.

    Args:
        x: [N, C, ...].
        weight, bias: [C].
    """
    return F.silu(F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)).to(x.dtype)


def guided_update(x: Tensor, under: Tensor, base: Tensor, guidance: float, keep: float, gain: float) -> Tensor:
    """keep x + gain (base + guidance (under - base)): a step of an Euler-like solver under guidance."""
    out = base.float() + guidance * (under.float() - base.float())
    return keep * x + gain * out.to(x.dtype)
