"""Random numbers as a pure function of (seed, stream, row): nothing to save, equal at any world size and batch layout.

A row is (global sample index, step, view): which sample, at which step, and which of its augmented views.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rayproj.kernels import philox


def philox_key(seed: int, stream: str) -> tuple[int, int]:
    """Two 32-bit words that separate the named streams of a seed."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def places(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows of samples that are told apart by their number alone, int64 [count, 3]."""
    return of_samples(torch.arange(count, device=device))


def of_samples(number: Tensor) -> Tensor:
    """Rows int64 [B, 3] of the samples of these numbers [B], the same at every step."""
    return torch.stack([number, torch.zeros_like(number), torch.zeros_like(number)], 1)


def _draw(generate: Callable[..., Tensor], seed: int, stream: str, row: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    index, step, view = (row[:, None, i] & philox.MASK for i in range(3))
    block = torch.arange((count + 3) // 4, device=row.device)[None, :]
    counter = torch.broadcast_tensors(block, index, step, view)
    values = generate(counter, philox_key(seed, stream))
    return values.flatten(1)[:, :count].reshape(len(row), *shape)


def normal(seed: int, stream: str, row: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normals for each row.

    Args:
        seed: the run's seed.
        stream: what the numbers are for, e.g. "noise"; streams are independent.
        row: int64 [B, 3]: (global sample index, step, view).
        shape: shape of one sample's draw.

    Returns:
        fp32 [B, *shape] on the device of `row`.
    """
    return _draw(philox.normal, seed, stream, row, shape)


def uniform(seed: int, stream: str, row: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniforms in [0, 1) for each row; arguments and shape as in `normal`."""
    return _draw(philox.uniform, seed, stream, row, shape)
