"""Gaussian noise for a rank's interval of the flat gradient, a pure function of the element: no coordinate twice, none
missing, at any world size."""

from __future__ import annotations

from torch import Tensor

from rayproj.kernels import philox


def key_words(key: bytes) -> tuple[int, int, int, int]:
    """16 secret bytes as four words: two key the generator, so that nobody without them can subtract the noise; the
    others are part of its counter."""
    assert len(key) == 16
    first, second, third, fourth = (int.from_bytes(key[i : i + 4], "little") for i in range(0, 16, 4))
    return first, second, third, fourth


def gaussian(key: bytes, step: int, attempt: int, interval: range, device: str = "cpu") -> Tensor:
    """Standard normals for the elements `interval` of the flat vector.

    Args:
        key: 16 secret bytes.
        step, attempt: which release; noise is never used for two.

    Returns:
        fp32 [len(interval)].
    """
    return philox.flat_normal(key_words(key), step, attempt, interval, device)


def add_noise(
    total: Tensor, key: bytes, step: int, attempt: int, start: int, noisy: int, std: float, normaliser: float
) -> Tensor:
    """The same noise and the division by the normaliser in one pass over a shard on a GPU; see the kernel."""
    from rayproj.kernels import philox_triton  # Triton comes with PyTorch's CUDA builds alone

    return philox_triton.add_noise(total, key_words(key), step, attempt, start, noisy, std, normaliser)
