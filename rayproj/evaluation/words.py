"""Free texts as one of a vocabulary, or as themselves in a plain form: what open-vocabulary models answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rayproj.errors import UserError
from rayproj.evaluation.folders import loading

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


def read_synonyms(path: str) -> dict[str, str]:
    """A JSON file of texts and the words that they mean.

    Raises:
        UserError: it is not there, or something else.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError:
        raise UserError(f"There is no file '{path}' that can be read; check the path.") from None
    except ValueError as error:
        raise UserError(f"'{path}' is no JSON: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise UserError(f'\'{path}\' is to hold texts and the words that they mean, such as {{"auto": "car"}}.')
    return found


def text_embedder(folder: str, batch: int = 64) -> Embed:
    """Texts to vectors by a model of transformers: the text side of CLIP and its like, else the mean of the last layer over
    the words (Reimers and Gurevych 2019, "Sentence-BERT", section 3).

    Raises:
        UserError: there is none.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    with loading(f"The embedder '{folder}'", "a text model of transformers and its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        found = []
        for begin in range(0, len(texts), batch):
            part = texts[begin : begin + batch]
            given = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            given.pop("token_type_ids", None)
            if hasattr(model, "text_model"):
                pooled = model.text_model(**given).pooler_output
                found.append(getattr(model, "text_projection", torch.nn.Identity())(pooled).numpy())
            else:
                mask = given["attention_mask"].unsqueeze(-1).float()
                found.append(((model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(found)

    return embed


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found
