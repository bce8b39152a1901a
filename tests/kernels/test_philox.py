"""Philox4x32-10 against the known answers that its authors publish with Random123 (kat_vectors)."""

import pytest
import torch

from rayproj.kernels import philox

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected) -> None:  # type: ignore[no-untyped-def]
    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


def test_extreme_words_stay_finite() -> None:
    edge = torch.tensor([0, 1, 0xFFFFFFFF])
    assert torch.isfinite(torch.stack(philox.normals_from_bits(edge, edge))).all()
    assert philox.uniform_from_bits(edge).max() < 1
