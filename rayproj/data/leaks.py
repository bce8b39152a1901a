"""What is in two parts of a split, where it must be in one: groups, such as a patient's images, and the same images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import TypeVar

from rayproj.data.sources import pixels
from rayproj.data.split import EVALUATED, ROLES, TRAIN, UNLABELLED
from rayproj.data.writer import Sample
from rayproj.errors import UserError

AT_ONCE = 4096  # samples that are handed to threads
T = TypeVar("T")


class Leaks(Enum):
    """What is done about them."""

    refuse = "refuse"
    drop = "drop"  # they stay in the first of the parts: training goes before evaluation
    allow = "allow"  # not looked for, which saves that all images are read once more


def crossing(parts: Mapping[str, Sequence[Hashable]]) -> Iterator[tuple[str, int, str]]:
    """What is in two parts: (part, index in it, the part that had it before), by the keys of the samples of each.

    Parts come in the order of `ROLES`, with those of other names before the evaluated ones, as they are given. `train` and
    `unlabelled` are both for training and may have keys in common.
    """
    first: dict[Hashable, str] = {}
    for part in sorted(parts, key=_rank):
        for index, key in enumerate(parts[part]):
            before = first.setdefault(key, part)
            if _side(before) != _side(part):
                yield part, index, before


def _rank(part: str) -> int:
    return ROLES.index(part) + (part in EVALUATED) if part in ROLES else len(ROLES) - len(EVALUATED)


def _side(part: str) -> str:
    return TRAIN if part == UNLABELLED else part


def take_out(
    parts: dict[str, list[Sample]], what: str, keys: Callable[[list[Sample]], Sequence[Hashable]], policy: Leaks
) -> dict[str, int]:
    """Take out of each part what an earlier one has too; as many as these are, by part.

    Args:
        parts: samples of `Source.rows` by part.
        what: the key is of, for the message: "group" or "image".
        keys: of samples.

    Raises:
        UserError: there are some and the policy refuses them, or a part has nothing else.
    """
    if policy is Leaks.allow or len(parts) < 2:
        return {}
    found: dict[str, set[int]] = {}
    for part, index, before in crossing({part: keys(samples) for part, samples in parts.items()}):
        if policy is Leaks.refuse:
            sample = parts[part][index]
            name = sample["group"] if what == "group" else getattr(sample["image"], "path", sample["key"])
            raise UserError(
                f"The {what} '{name}' is in the parts '{before}' and '{part}'; split by what belongs together "
                f"(source.group_column, data.fractions), or leave such samples out of '{part}' by data.leaks=drop."
            )
        found.setdefault(part, set()).add(index)
    for part, gone in found.items():
        parts[part] = [sample for index, sample in enumerate(parts[part]) if index not in gone]
        if not parts[part]:
            raise UserError(f"All of the part '{part}' is in other parts too; split it from them otherwise.")
    return {part: len(gone) for part, gone in found.items()}


def groups(samples: list[Sample]) -> list[str]:
    return [sample["group"] for sample in samples]


def fingerprints(samples: list[Sample]) -> list[bytes]:
    """What is equal for images that are equal, pixel by pixel, and for no others."""

    def of(sample: Sample) -> bytes:
        image = pixels(sample)
        return hashlib.blake2b(image.tobytes(), digest_size=16, person=str(image.shape).encode()).digest()

    return [value for i in range(0, len(samples), AT_ONCE) for value in in_threads(of, samples[i : i + AT_ONCE])]


def in_threads(function: Callable[[Sample], T], samples: list[Sample]) -> list[T]:
    """The function of each sample; files are read and decoded beside each other."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, samples))
