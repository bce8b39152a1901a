"""Gaussian noise for a rank's interval of the flat gradient, a pure function of the element: no coordinate twice, none
missing, at any world size."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
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


PIECE = 2**21  # AES blocks at a time: 32 MiB of keystream


def secure_gaussian(key: bytes, step: int, attempt: int, interval: range, device: str = "cpu") -> Tensor:
    """As `gaussian`, of a cryptographic generator: AES-256 in counter mode, for where an adversary may know much of the
    noise and must not tell the rest of it. Drawn on the host, at any device.

    Elements 2j and 2j + 1 are Box-Muller, in fp64, of the two 64-bit uniforms in the keystream's block j of the counter
    (step, attempt, j). The tail ends at sqrt(-2 ln 2^-65) = 9.49 sigma. As of all noise that is rounded to floats, what
    Mironov (2012, "On significance of the least significant bits for differential privacy") says of its last bits holds.
    """
    secret = hashlib.blake2b(b"noise", key=key, digest_size=32).digest()  # apart from the key's other uses
    first, last = interval.start // 2, -(-interval.stop // 2)
    drawn = torch.empty(2 * (last - first), dtype=torch.float32)
    for block in range(first, last, PIECE):
        count = min(PIECE, last - block)
        counter = b"".join(n.to_bytes(size, "big") for n, size in ((step, 4), (attempt, 4), (block, 8)))
        words = np.frombuffer(keystream(secret, counter, 16 * count), dtype="<u8").reshape(count, 2).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((words[:, 0] + 0.5) * 2.0**-64))
        angle = (2.0 * np.pi * 2.0**-64) * words[:, 1]
        pair = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        begin = 2 * (block - first)
        drawn[begin : begin + 2 * count] = torch.from_numpy(pair.astype(np.float32)).flatten()
    return drawn[interval.start - 2 * first : interval.stop - 2 * first].to(device)


def keystream(key: bytes, counter: bytes, size: int) -> bytes:
    """The first bytes of AES in counter mode (NIST SP 800-38A, section 6.5).

    Args:
        key: 32 bytes, of AES-256.
        counter: the first counter block, 16 bytes, big-endian.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    return Cipher(AES(key), CTR(counter)).encryptor().update(bytes(size))
