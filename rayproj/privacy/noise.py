"""Gaussian noise for a rank's interval of the flat gradient, a pure function of the element: no coordinate twice, none
missing, at any world size."""

from __future__ import annotations

import torch
from torch import Tensor

from rayproj.kernels import philox


def gaussian(key: bytes, step: int, attempt: int, interval: range, device: str | torch.device = "cpu") -> Tensor:
    """Standard normals for the elements `interval` of the flat vector.

    Args:
        key: 16 secret bytes. The first 8 key the generator, so that nobody without them can subtract the noise; the
            others are part of its counter.
        step, attempt: which release; noise is never used for two.

    Returns:
        fp32 [len(interval)].
    """
    first, last = interval.start // 4, -(-interval.stop // 4)
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 16, 4)]
    # 2^34 elements and 2^32 steps fit; the attempt and the rest of the key share the last word.
    parts = (block & philox.MASK, torch.full_like(block, step), torch.full_like(block, attempt ^ words[2]))
    normals = philox.normal((*parts, (block >> 32) ^ words[3]), (words[0], words[1]))
    return normals.flatten()[interval.start - 4 * first : interval.stop - 4 * first]
