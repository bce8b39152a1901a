"""Which kernels are used: those that measured faster than torch, eager and compiled (`benchmarks/kernels.json`)."""

from __future__ import annotations

import torch
from torch import Tensor


def admits(kernel: str, x: Tensor) -> bool:
    """Whether to use a kernel on these activations."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.dtype is torch.bfloat16
