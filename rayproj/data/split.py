"""Splits by a key, so that what belongs together stays together and the split never depends on order."""

from __future__ import annotations

import hashlib


def assign(group: str, fractions: dict[str, float], seed: int) -> str:
    """The part that a group belongs to, with the given probabilities.

    Args:
        group: what must not be torn apart: a role, a patient, or an image's own key.
        fractions: of each part; they sum to 1.
    """
    digest = hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    for part, fraction in fractions.items():
        position -= fraction
        if position < 0:
            return part
    return next(reversed(fractions))
