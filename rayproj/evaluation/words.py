"""Free texts as one of a vocabulary, or as themselves in a plain form: what open-vocabulary models answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

ARTICLES = {"a", "an", "the"}
Embed = Callable[[list[str]], np.ndarray]
"""Texts to vectors [n, d]."""


def plain(text: str, known: frozenset[str] = frozenset()) -> str:
    """Lower case, without punctuation, leading articles and outer space; a plural whose singular is known is that."""
    words = re.sub(r"[^\w\s'-]", " ", text.lower()).split()
    while len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    found = " ".join(words)
    for ending, other in (("ies", "y"), ("es", ""), ("s", "")):
        if found not in known and found.endswith(ending) and found.removesuffix(ending) + other in known:
            return found.removesuffix(ending) + other
    return found


def mapped(
    texts: Sequence[str],
    vocabulary: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    embed: Embed | None = None,
    least: float = 0.5,
) -> list[str]:
    """Each text as a word of the vocabulary where it is one, by `plain` or as a synonym; else, with `embed`, the nearest by
    cosine similarity if that is `least` or more; else in its plain form."""
    words = {plain(word): word for word in vocabulary}
    same = {plain(text): word for text, word in (synonyms or {}).items()}
    known = frozenset({*words, *same})
    forms = [plain(text, known) for text in texts]
    found = [words.get(same.get(form, form), same.get(form, form)) for form in forms]
    unknown = sorted({form for form, word in zip(forms, found, strict=True) if word not in words.values()} - {""})
    if embed is None or not unknown or not vocabulary:
        return found
    similar = _unit(embed(unknown)) @ _unit(embed(list(vocabulary))).T
    best = similar.argmax(1)
    nearest = {form: vocabulary[k] for form, k, row in zip(unknown, best, similar, strict=True) if row[k] >= least}
    return [nearest.get(form, word) for form, word in zip(forms, found, strict=True)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found
