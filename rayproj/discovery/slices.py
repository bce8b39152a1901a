"""What a finding is about: the images of a label that have certain attributes, or certain words in their descriptions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

WORDS = ""  # in place of an attribute's name: the value is a phrase of the description
COMMON = "a an and are as at be by for from has have in into is it its of on or s that the there this to with without"
STOP = frozenset(COMMON.split(" "))
LONGEST = 3  # words of a phrase


class Term(NamedTuple):
    """A value of an attribute, or a phrase."""

    attribute: str
    value: str

    @property
    def name(self) -> str:
        return f"'{self.value}'" if self.attribute == WORDS else f"{self.attribute}={self.value}"


@dataclass(frozen=True, order=True)
class Slice:
    """The images of a label that have all of some terms; without terms, all of the label."""

    label: str
    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, label: str, terms: Any) -> Slice:
        return cls(label, tuple(sorted(Term(*term) for term in terms)))

    @property
    def name(self) -> str:
        return ", ".join([self.label, *(term.name for term in self.terms)])

    @property
    def values(self) -> dict[str, str]:
        """Of its attributes."""
        return {term.attribute: term.value for term in self.terms if term.attribute != WORDS}

    @property
    def phrases(self) -> list[str]:
        return [term.value for term in self.terms if term.attribute == WORDS]

    def without(self, term: Term) -> Slice:
        """The slice that lacks a term."""
        return Slice(self.label, tuple(other for other in self.terms if other != term))

    def shorter(self) -> list[Slice]:
        """The slices that lack one of the terms, but for the label itself."""
        return [self.without(term) for term in self.terms] if len(self.terms) > 1 else []

    def to_json(self) -> list[Any]:
        return [self.label, [list(term) for term in self.terms]]

    @classmethod
    def from_json(cls, values: Any) -> Slice:
        return cls.of(*values)


def phrases(text: str) -> frozenset[str]:
    """The runs of up to three words between punctuation that neither begin nor end with a word like "of"; lower case."""
    found = set()
    for part in re.split(r"[^\w\s'\-]+", text.lower()):
        words = part.split()
        for size in range(1, LONGEST + 1):
            for begin in range(len(words) - size + 1):
                run = words[begin : begin + size]
                if run[0] not in STOP and run[-1] not in STOP:
                    found.add(" ".join(run))
    return frozenset(found)


def described(text: str, label: str) -> frozenset[Term]:
    """The terms of a description, without what the label's own name says."""
    return frozenset(Term(WORDS, phrase) for phrase in phrases(text) - phrases(label))
