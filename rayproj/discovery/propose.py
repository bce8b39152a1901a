"""Which slices may fail more: a pure function of the images that were looked at. Nothing is claimed by it; what it proposes
is tested on other images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rayproj.discovery.clusters import clusters
from rayproj.discovery.slices import Slice, Term
from rayproj.evaluation.proportions import Rate, higher, higher_each

SUPPORT = 3  # failures that a slice must have
BEST = 24  # terms of a group of failures of which pairs are made
DOUBT = 0.05  # p up to which a slice is proposed, and a longer one preferred to a shorter


@dataclass(frozen=True)
class Looked:
    """Images that were classified, in columns of equal length.

    Attributes:
        labels, answers: the label that each shows, and the class that was predicted.
        failed: bool.
        terms: what is known of each.
        base: bool: drawn for the label as such, not for a slice that was suspected already.
        features: fp32 [n, D], or None.
    """

    labels: np.ndarray
    answers: np.ndarray
    failed: np.ndarray
    terms: Sequence[frozenset[Term]]
    base: np.ndarray
    features: np.ndarray | None

    def of(self, chosen: np.ndarray) -> Looked:
        features = None if self.features is None else self.features[chosen]
        terms = [self.terms[i] for i in chosen.tolist()]
        return Looked(
            self.labels[chosen], self.answers[chosen], self.failed[chosen], terms, self.base[chosen], features
        )


@dataclass(frozen=True)
class Proposal:
    """A slice that seems to fail more than the rest of its label.

    Attributes:
        wrong: the most common wrong class.
        p: of Fisher's test on the images by which it was found, for the order alone.
    """

    slice: Slice
    wrong: str
    p: float


def propose(looked: Looked, most: int, longest: int = 2) -> list[Proposal]:
    """The slices that stand out, the clearest first.

    Of each label, the failures as a whole and each of their clusters are described by the terms, and pairs of terms, that
    they have more often than the images that were classified rightly. The clearest description is taken, shortened as far
    as it carries the effect, and the images that it covers are set aside; then the next is looked for among the others, so
    that two names of the same images are not both proposed.

    Args:
        most: slices.
        longest: terms of a slice.
    """
    found = []
    for label in dict.fromkeys(looked.labels.tolist()):
        found += _of_label(label, looked.of(np.flatnonzero(looked.labels == label)), most, longest)
    return sorted(found, key=lambda proposal: (proposal.p, proposal.slice))[:most]


def _of_label(label: str, looked: Looked, most: int, longest: int) -> list[Proposal]:
    failures = np.flatnonzero(looked.failed)
    counts = Counter(term for i in failures.tolist() for term in looked.terms[i])
    vocabulary = sorted((term for term, count in counts.items() if count >= SUPPORT), key=_simplest)
    if not vocabulary:
        return []
    has: np.ndarray = np.array([[term in terms for terms in looked.terms] for term in vocabulary])
    features = None if looked.features is None else looked.features[failures]
    of, groups = clusters(looked.answers[failures], features), [looked.failed]
    if of.max() > 0:
        groups += [np.isin(np.arange(len(looked.failed)), failures[of == k]) for k in range(of.max() + 1)]
    left, found = np.ones(len(looked.failed), bool), list[Proposal]()
    while len(found) < most:
        best = min(
            (_clearest(group & left, ~looked.failed & left, looked.base, has, longest) for group in groups),
            key=lambda scored: (scored[0], len(scored[1])),
        )
        p, chosen = best
        if p > DOUBT:
            break
        chosen = _shortened(chosen, has, looked.failed, left)
        members = has[list(chosen)].all(0)
        wrong = Counter(looked.answers[members & looked.failed & left].tolist()).most_common(1)[0][0]
        found.append(Proposal(Slice.of(label, [vocabulary[k] for k in chosen]), wrong, p))
        left &= ~members
    return found


def _simplest(term: Term) -> tuple[bool, int, Term]:
    """Attributes before phrases, and phrases of few words first: of equally clear terms the first is taken."""
    return term.attribute == "", len(term.value.split()), term


def _clearest(
    failed: np.ndarray, right: np.ndarray, base: np.ndarray, has: np.ndarray, longest: int
) -> tuple[float, tuple[int, ...]]:
    """p and the terms, by number, that the failures have the most clearly more often than what was classified rightly."""
    singles = [(k,) for k in range(len(has))]
    p = _scores(failed, right, base, has)
    sets, scores = list[tuple[int, ...]](singles), [p]
    best = np.argsort(p, kind="stable")[:BEST]
    for size in range(2, longest + 1):
        longer = list(combinations(sorted(map(int, best)), size))
        if longer:
            scores.append(_scores(failed, right, base, np.array([has[list(c)].all(0) for c in longer])))
            sets += longer
    joined = np.concatenate(scores)
    first = int(np.argmin(joined))
    return float(joined[first]), sets[first]


def _scores(failed: np.ndarray, right: np.ndarray, base: np.ndarray, has: np.ndarray) -> np.ndarray:
    """p of each slice [n], given its members bool [n, images], against the label's other images that were drawn as such."""
    seen, rest = failed | right, ~has & base
    counts = [(members & images).sum(1) for members in (has, rest) for images in (failed, seen)]
    return np.where(counts[0] >= SUPPORT, higher_each(*counts), 1.0)


def _shortened(chosen: tuple[int, ...], has: np.ndarray, failed: np.ndarray, left: np.ndarray) -> tuple[int, ...]:
    """Without the terms whose absence changes nothing: what has the others but not them fails no less."""
    for term in chosen:
        rest = tuple(k for k in chosen if k != term)
        if rest:
            wider = has[list(rest)].all(0) & left
            inside, outside = (
                Rate(int((failed & m).sum()), int(m.sum())) for m in (wider & has[term], wider & ~has[term])
            )
            if higher(inside, outside) > DOUBT:
                return _shortened(rest, has, failed, left)
    return chosen
