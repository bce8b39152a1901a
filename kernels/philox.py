"""Philox4x32-10, the counter-based generator behind every random number here (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3", section 3.3). Eager torch reference; works on any device and gives the same bits on each.

A 32-bit word is held in an int64 tensor, because torch has no arithmetic on unsigned 32-bit integers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rayproj.kernels import adamw  # type: ignore[attr-defined]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: the key schedule
MASK = 0xFFFFFFFF
PIECE = 2**17  # counters at a time of a long draw, for the temporaries' sake: 64-bit words, some of them at once


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product: int64 wraps modulo 2^64, which leaves every bit in its place."""
    product = multiplier * word
    return (product >> 32) & MASK, product & MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds.

    Args:
        counter: four int64 tensors of one shape, words in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of that shape, words in [0, 2^32).
    """
    try:
        arrays = [word.numpy() for word in counter]
    except (RuntimeError, TypeError):  # on a GPU, within vmap, or without contents
        return _rounds(counter, key)
    return _rounds_on_host(arrays, key)


def _rounds(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _rounds_on_host(counter: list[np.ndarray], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The same in numpy, which has unsigned words, and takes less time to call: half to a quarter of `_rounds`."""
    c0, c1, c2, c3 = (word.astype(np.uint32, order="C") for word in counter)
    k0, k1 = key
    for _ in range(10):
        # Two 32-bit words to a product, the lower first on a little-endian machine.
        first, second = ((word * np.uint64(m)).view(np.uint32) for word, m in zip((c0, c2), MULTIPLIERS, strict=True))
        high0, low0, high1, low1 = first[..., 1::2], first[..., ::2], second[..., 1::2], second[..., ::2]
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint32(k0), low1, high0 ^ c3 ^ np.uint32(k1), low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return tuple(torch.from_numpy(word.astype(np.int64)) for word in (c0, c1, c2, c3))


def uniform_from_bits(word: Tensor) -> Tensor:
    """fp32 in [0, 1) from the upper 24 bits, which fp32 holds exactly."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def normals_from_bits(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller in fp64 from two words; returns two fp32 tensors. The tail ends at sqrt(-2 ln 2^-33) = 6.76 sigma."""
    radius = torch.sqrt(-2.0 * torch.log((first.to(torch.float64) + 0.5) * 2.0**-32))
    angle = (2.0 * math.pi * 2.0**-32) * second.to(torch.float64)
    return (radius * torch.cos(angle)).to(torch.float32), (radius * torch.sin(angle)).to(torch.float32)


def normal(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Standard normals, four to a counter: fp32 of shape [*counter.shape, 4]."""
    words = philox4x32(counter, key)
    return torch.stack((*normals_from_bits(words[0], words[1]), *normals_from_bits(words[2], words[3])), dim=-1)


def flat_normal(words: tuple[int, int, int, int], step: int, attempt: int, interval: range, device: str) -> Tensor:
    """Standard normals for an interval of a long flat vector, each a pure function of the element.

    Element i is the (i mod 4)-th normal of the counter (i div 4, step, attempt): 2^64 elements and 2^32 steps fit. The
    last two words of the key are folded into the counter.

    Args:
        words: the key, four words in [0, 2^32).

    Returns:
        fp32 [len(interval)].
    """
    first, last = interval.start // 4, -(-interval.stop // 4)
    drawn = torch.empty(4 * (last - first), dtype=torch.float32, device=device)
    for begin in range(first, last, PIECE):
        block = torch.arange(begin, min(begin + PIECE, last), dtype=torch.int64, device=device)
        parts = (
            block & MASK,
            torch.full_like(block, step & MASK),
            torch.full_like(block, (attempt & MASK) ^ words[2]),
            ((block >> 32) & MASK) ^ words[3],
        )
        piece = normal(parts, (words[0], words[1])).flatten()
        drawn[4 * (begin - first) : 4 * (begin - first) + len(piece)] = piece
    return drawn[interval.start - 4 * first : interval.stop - 4 * first]


def noisy_adamw(
    total: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    words: tuple[int, int, int, int],
    step: int,
    attempt: int,
    start: int,
    noisy: int,
    std: float,
    normaliser: float,
    updates: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """An update, in place, of a shard of a flat vector by AdamW (`adamw.update`) with the gradient
    (total + std * noise) / normaliser.

    What follows the first `noisy` elements is padding, to which AdamW does what it does to any element: where its total
    and moments are zero, as padding's are, only the weight decay is left.

    Args:
        total, master, exp_avg, exp_avg_sq: fp32 [n]: sum of the gradients, weights and moments of the elements start to
            start + n of the vector.
        words, step, attempt: of the noise, as of `flat_normal`.
        updates: how many the moments have seen, with this one: for the bias correction.
    """
    noise = flat_normal(words, step, attempt, range(start, start + noisy), str(total.device))
    gradient = total.clone()
    gradient[:noisy] += std * noise
    gradient /= normaliser
    adamw.update(gradient, master, exp_avg, exp_avg_sq, updates, lr, betas, eps, weight_decay)


def uniform(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Uniforms in [0, 1), four to a counter: fp32 of shape [*counter.shape, 4]."""
    return torch.stack([uniform_from_bits(word) for word in philox4x32(counter, key)], dim=-1)
