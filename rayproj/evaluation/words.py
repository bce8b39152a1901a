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
    """Each text as a word of the vocabulary where it is one, or a synonym of one: as it is written, else but for its case,
    else by `plain`; else, with `embed`, the nearest by cosine similarity if that is `least` or more; else in its plain form.

    A form that several words share, as "C", "C++" and "C#" do by `plain`, tells none of them.
    """
    own, same = list(zip(vocabulary, vocabulary, strict=True)), list((synonyms or {}).items())
    rules: list[Callable[[str], str]] = [str, lambda text: text.strip().lower(), plain]
    tables = [{**_meant(rule, same), **_meant(rule, own)} for rule in rules]
    forms_of = [plain(text) for text, _ in own + same]
    known, shared = frozenset(forms_of), frozenset(forms_of) - tables[-1].keys()
    rules[-1] = lambda text: plain(text, known)

    def of(text: str) -> str | None:
        return next((table[rule(text)] for rule, table in zip(rules, tables, strict=True) if rule(text) in table), None)

    found = {text: of(text) for text in set(texts)}
    forms = {text: rules[-1](text) for text in found}
    # What the plain form leaves out is what tells words apart that share it.
    asked = {text: text.strip() if form in shared else form for text, form in forms.items() if found[text] is None}
    unknown, nearest = sorted(set(asked.values()) - {""}), dict[str, str]()
    if embed is not None and unknown and vocabulary:
        similar = _unit(embed(unknown)) @ _unit(embed(list(vocabulary))).T
        best = similar.argmax(1)
        nearest = {form: vocabulary[k] for form, k, row in zip(unknown, best, similar, strict=True) if row[k] >= least}
    return [found[text] or nearest.get(asked[text], forms[text]) for text in texts]


def _meant(rule: Callable[[str], str], pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The word that each text means by its form under a rule, but for forms of which texts mean several."""
    words: dict[str, set[str]] = {}
    for text, word in pairs:
        words.setdefault(rule(text), set()).add(word)
    return {form: min(meant) for form, meant in words.items() if form and len(meant) == 1}


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
