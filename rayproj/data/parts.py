"""Parts made of the parts of a split, by rules: subsamples with a chosen joint distribution of their attributes.

Which samples a rule takes is a function of the seed and their keys: the first by a keyed hash. So a rule with a smaller
count takes some of those that one with a larger takes, and neither depends on the order of the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rayproj.errors import UserError

Parts = dict[str, list[dict[str, Any]]]
"""Part -> its samples, each with "key", "label" (the number of its class, -1 for none) and attributes."""


@dataclass
class KeepConfig:
    """Samples that a part is to have. The rules of a part add up, and what none of them takes is left out."""

    part: str = "???"
    of: str = ""  # the part of the split that they are taken from; "": of the same name
    where: dict[str, list[str]] = field(
        default_factory=dict
    )  # "label" or attribute -> values that it may have; {}: any
    count: int = 0  # exactly so many; 0: all
    copies: int = 1  # of each
    # "label" or attribute -> the value that they get, such as a wider group, or a label that is wrong.
    become: dict[str, str] = field(default_factory=dict)
    after: int = 0  # not the first so many, which another rule may take

    def problems(self) -> list[str]:
        found = [
            f"data.keep: {name} must not be negative, not {value}."
            for name, value in (("count", self.count), ("after", self.after))
            if value < 0
        ]
        return found if self.copies > 0 else [*found, f"data.keep: copies must be positive, not {self.copies}."]

    def __str__(self) -> str:
        where = ", ".join(f"{name}: {'|'.join(values)}" for name, values in self.where.items())
        some = f"{self.count} of " if self.count else ""
        rest = f", after {self.after}" if self.after else ""
        return f"the rule of '{self.part}' for {some}{where or 'all'} of '{self.of or self.part}'{rest}"


def keep(parts: Parts, rules: Sequence[KeepConfig], classes: Sequence[str], seed: int) -> Parts:
    """The parts that the rules make, and those that no rule speaks of as they are.

    Raises:
        UserError: a rule asks for a part, attribute or number of samples that is not there, or for what another has taken.
    """
    if not rules:
        return parts
    spoken = {rule.of or rule.part for rule in rules}
    found: Parts = {name: samples for name, samples in parts.items() if name not in spoken}
    if taken := [rule.part for rule in rules if rule.part in found]:
        raise UserError(f"data.keep: there is a part '{taken[0]}' already; give the part that is made another name.")
    for rule in rules:
        found.setdefault(rule.part, []).extend(_taken(parts, rule, classes, seed))
    for name in {rule.part for rule in rules}:
        keys = [sample["key"] for sample in found[name]]
        if len(set(keys)) < len(keys):
            raise UserError(
                f"data.keep: two rules of '{name}' take the same sample; let their 'where' exclude each other."
            )
    return found


def _taken(parts: Parts, rule: KeepConfig, classes: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """What a rule takes."""
    if (rule.of or rule.part) not in parts:
        raise UserError(f"data.keep: {rule}: there is no such part, only {', '.join(sorted(parts))}.")
    samples = parts[rule.of or rule.part]
    known = samples[0].keys() - {"key", "image"}
    if unknown := sorted((rule.where.keys() | rule.become.keys()) - known):
        raise UserError(f"data.keep: {rule}: no attribute '{unknown[0]}'; there are {', '.join(sorted(known))}.")

    def matches(sample: dict[str, Any]) -> bool:
        number = sample["label"]
        named = {**sample, "label": classes[number] if number >= 0 else ""}
        return all(str(named[name]) in values for name, values in rule.where.items())

    there = sorted(filter(matches, samples), key=lambda sample: hashed("keep", sample["key"], seed))
    if len(there) < (needed := rule.after + max(1, rule.count)):
        raise UserError(
            f"data.keep: {rule} finds {len(there)} samples, and asks for {needed}; lower its count or after."
        )
    become: dict[str, Any] = dict(rule.become)
    if "label" in become:
        if become["label"] not in classes:
            raise UserError(f"data.keep: {rule} makes the label '{become['label']}'; there are {', '.join(classes)}.")
        become["label"] = list(classes).index(become["label"])
    return [
        {**sample, **become, "key": sample["key"] + (f"-{copy + 1}" if copy else "")}
        for sample in there[rule.after : rule.after + rule.count if rule.count else None]
        for copy in range(rule.copies)
    ]


def shuffle(samples: list[dict[str, Any]], attributes: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """The samples with the values of these attributes dealt out among them anew, together: as frequent as they were, and
    independent of everything else. A control for whatever is said to gain by them.

    Raises:
        UserError: there is no such attribute.
    """
    if unknown := sorted(set(attributes) - samples[0].keys()):
        raise UserError(f"data.shuffle: no attribute '{unknown[0]}'; there are {', '.join(sorted(samples[0]))}.")
    dealt = sorted(samples, key=lambda sample: hashed("shuffle", sample["key"], seed))
    return [{**own, **{name: other[name] for name in attributes}} for own, other in zip(samples, dealt, strict=True)]


def hashed(purpose: str, key: str, seed: int) -> bytes:
    """The place of a key in a keyed order."""
    return hashlib.blake2b(f"{purpose}/{seed}/{key}".encode(), digest_size=16).digest()
