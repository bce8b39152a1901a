"""What is proposed of images that were looked at: planted slices, the shortest name of each, and nothing by chance alone."""

import math

import numpy as np

from rayproj.discovery.propose import Looked, propose
from rayproj.discovery.slices import Slice, Term
from rayproj.evaluation.proportions import Rate, adjusted, higher

STYLES, TONES, NOISE = ("flat", "round", "sketch"), ("light", "dark"), ("a1", "a2", "a3", "a4")


def drawn(rng: np.random.Generator, images: int, rates: dict[frozenset[Term], float], base: float = 0.1) -> Looked:
    """Images of one label, two attributes and words, that fail with a rate by what they have, else with `base`."""
    terms, failed = [], []
    for _ in range(images):
        words = rng.choice(NOISE, 2, replace=False)
        tone = rng.choice(TONES)
        own = {Term("style", rng.choice(STYLES)), Term("tone", tone), Term("", f"{tone} skin"), Term("", str(tone))}
        own |= {Term("", str(word)) for word in words}
        terms.append(frozenset(own))
        failed.append(rng.random() < max([rate for of, rate in rates.items() if of <= own], default=base))
    label, wrong = np.full(images, "cat", object), np.array(["dog" if f else "cat" for f in failed], object)
    return Looked(label, wrong, np.array(failed), terms, np.ones(images, bool), None)


def test_a_planted_slice_is_proposed_first_by_its_shortest_name() -> None:
    for seed in range(10):
        found = propose(drawn(np.random.default_rng(seed), 300, {frozenset({Term("tone", "dark")}): 0.5}), 5)
        assert found[0].slice == Slice("cat", (Term("tone", "dark"),)) and found[0].wrong == "dog"
        assert not any(Term("", "dark") in p.slice.terms for p in found), "another name of the same images"


def test_a_pair_is_proposed_where_both_are_needed() -> None:
    pair = frozenset({Term("tone", "dark"), Term("style", "flat")})
    for seed in range(10):
        found = propose(drawn(np.random.default_rng(seed), 400, {pair: 0.7}), 5)
        assert frozenset(found[0].slice.terms) == pair
        single = propose(drawn(np.random.default_rng(seed), 400, {pair: 0.7}), 5, longest=1)
        assert all(len(p.slice.terms) == 1 for p in single)


def test_several_slices_and_labels() -> None:
    rates = {frozenset({Term("tone", "dark")}): 0.4, frozenset({Term("style", "flat")}): 0.6}
    cats = drawn(np.random.default_rng(0), 600, rates)
    dogs = drawn(np.random.default_rng(1), 300, {frozenset({Term("", "a1")}): 0.6})
    both = Looked(
        np.concatenate([cats.labels, np.full(300, "dog", object)]),
        np.concatenate([cats.answers, np.where(dogs.failed, "cat", "dog")]),
        np.concatenate([cats.failed, dogs.failed]),
        [*cats.terms, *dogs.terms],
        np.ones(900, bool),
        np.random.default_rng(2).normal(size=(900, 4)).astype(np.float32),
    )
    names = [p.slice.name for p in propose(both, 3)]
    assert sorted(names) == ["cat, style=flat", "cat, tone=dark", "dog, 'a1'"]
    assert [p.slice.name for p in propose(both, 1)] == names[:1]
    nothing = Looked(*(c[:0] for c in (both.labels, both.answers, both.failed)), [], np.ones(0, bool), None)
    assert propose(nothing, 3) == []


def test_nothing_is_found_by_chance_more_often_than_the_level_says() -> None:
    """Classifiers that fail alike everywhere: whatever is proposed is tested on fresh images."""
    searches, level, false = 200, 0.05, 0
    for seed in range(searches):
        rng = np.random.default_rng(seed)
        proposals = propose(drawn(rng, 100, {}, 0.2), 8)
        base = Rate(int(rng.binomial(100, 0.2)), 100)
        q = adjusted([higher(Rate(int(rng.binomial(50, 0.2)), 50), base) for _ in proposals])
        false += any(value <= level for value in q)
    assert false / searches <= level + 2 * math.sqrt(level * (1 - level) / searches)
