"""The noise of the cryptographic generator: AES by its published vectors, a Gaussian, the same at any partition."""

import pytest
import torch

from rayproj.privacy import noise
from rayproj.privacy.noise import gaussian, keystream, secure_gaussian
from tests.support import checks

KEY = bytes(range(16))


def test_the_keystream_is_that_of_nist() -> None:
    """SP 800-38A, F.5.5: CTR-AES256.Encrypt, four blocks."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert bytes(a ^ b for a, b in zip(plain, keystream(key, counter, 64), strict=True)) == cipher


def test_it_is_gaussian_and_every_coordinate_its_own() -> None:
    checks.noise_is_gaussian(secure_gaussian)


def test_the_same_at_any_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = secure_gaussian(KEY, 3, 1, range(0, 1000))
    monkeypatch.setattr(noise, "PIECE", 16)
    assert torch.equal(secure_gaussian(KEY, 3, 1, range(0, 1000)), whole)
    for size in (1, 7, 250, 333):
        parts = [secure_gaussian(KEY, 3, 1, range(i, min(i + size, 1000))) for i in range(0, 1000, size)]
        assert torch.equal(torch.cat(parts), whole)
    far = 2**35 + 1  # behind 2^32 blocks
    assert torch.equal(
        secure_gaussian(KEY, 3, 1, range(far, far + 9))[4:], secure_gaussian(KEY, 3, 1, range(far + 4, far + 9))
    )


def test_steps_starts_keys_and_generators_are_independent() -> None:
    checks.noises_are_independent(secure_gaussian, gaussian(KEY, 3, 0, range(100_000)))


def test_an_empty_interval_has_no_noise() -> None:
    assert secure_gaussian(KEY, 3, 0, range(5, 5)).shape == (0,)
