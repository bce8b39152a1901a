"""A text as it is read: what its characters stand for and look like, without those that nobody sees."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache

# Letters of other alphabets that are drawn much like Latin ones, and for which the table of confusables has others or none.
ALIKE = str.maketrans("кмпβεκμχω", "kmnbekuxw")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffd")  # they are letters or signs by their category


def unseen(character: str) -> bool:
    """Whether it has no form of its own: a mark on another, a blank that is no space, a control or format character, one for
    private use, or none that Unicode knows. The tokenizer of BERT drops them all, and reads on."""
    return character in BLANK or (
        character not in "\t\n\r" and unicodedata.category(character) in ("Mn", "Me", "Cc", "Cf", "Cn", "Co", "Cs")
    )


@cache
def plain(character: str) -> str:
    """The small letters that a character stands for or looks like: compatibility forms (Unicode NFKD) without marks, Latin
    letters as those that they are named after, and the Latin letters among a letter's confusables (Unicode Technical
    Standard 39)."""
    rest = "".join(one for one in unicodedata.normalize("NFKD", character).casefold() if not unseen(one))
    if rest.isascii():
        return rest
    return _named(character) or _alike(character) or "".join(_named(one) or _alike(one) or one for one in rest)


def _named(character: str) -> str:
    """A, of LATIN SMALL LETTER A WITH STROKE and LATIN LETTER SMALL CAPITAL A; "" of what is no Latin letter."""
    name = unicodedata.name(character, "").partition(" WITH ")[0]
    kind, _, letter = name.rpartition(" ")
    latin = "LATIN" in kind and kind.endswith((" LETTER", " LETTER SMALL CAPITAL"))
    return letter.lower() if latin and len(letter) == 1 else ""


def _alike(character: str) -> str:
    if not character.isalpha():
        return ""
    own = character.translate(ALIKE)
    if own != character:
        return own
    from confusable_homoglyphs import confusables  # its table takes a while to read, and most texts need none

    found = confusables.is_confusable(character, greedy=True) or [{"homoglyphs": []}]
    return next((letter for one in found[0]["homoglyphs"] if (letter := _letter(one["c"]))), "")


def _letter(alike: str) -> str:
    """The Latin letter that it is, but for marks; else ""."""
    rest = [one for one in unicodedata.normalize("NFKD", alike) if not unseen(one)]
    return _named(rest[0]) if len(rest) == 1 else ""


def as_written(character: str) -> str:
    """What a character stands for (Unicode NFKC), with its case."""
    return unicodedata.normalize("NFKC", character)


class Reading:
    """A text in other characters.

    Args:
        of: what stands for a character.
        instead: what stands for one that nobody sees.

    Attributes:
        text: these.
        origin: of each, which character of the text it is of.
    """

    def __init__(self, text: str, of: Callable[[str], str] = plain, instead: str = "") -> None:
        found = [
            (one, i)
            for i, character in enumerate(text)
            for one in (instead if unseen(character) else of(character))
            if not unseen(one)
        ]
        self.text, self.origin = "".join(one for one, _ in found), [i for _, i in found]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Of the text as it was given."""
        return self.origin[start], self.origin[end - 1] + 1


def readings(text: str) -> list[Reading]:
    """In plain letters: some tokenizers drop what nobody sees, and others part words at it."""
    return [Reading(text), *([Reading(text, instead=" ")] if any(map(unseen, text)) else [])]
