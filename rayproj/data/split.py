"""Splits by a key, so that what belongs together stays together and the split never depends on order; and what a part is
for."""

from __future__ import annotations

import hashlib

TRAIN = "train"
UNLABELLED = "unlabelled"  # for trainings that need no label: no sample has one
EVALUATED = ("id_val", "id_test", "ood_val", "ood_test")  # in and out of the domain of the training images
ROLES = (TRAIN, UNLABELLED, *EVALUATED)


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


def by_label(part: str, label: int) -> str | None:
    """Where a sample of a part goes by its label: training samples without one (-1) to those that need none, evaluated ones
    nowhere."""
    if label >= 0:
        return part
    return None if part in EVALUATED else UNLABELLED if part == TRAIN else part
