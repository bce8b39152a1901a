"""What in a text may lead to a person."""

from __future__ import annotations

import re
from collections.abc import Callable


def luhn(number: str) -> bool:
    """Whether the last digit of a card number checks the others (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def mod97(number: str) -> bool:
    """Whether the digits after the country of an IBAN check the others (ISO 13616-1, ISO/IEC 7064 MOD 97-10)."""
    compact = "".join(number.split()).upper()
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


# In the order in which they are looked for: a place belongs to the first kind whose pattern it has, checked or not.
PERSONAL = {
    "e-mail address": r"[\w.+-]+@[\w-]+\.[\w.-]*\w",
    "IP address": r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])",
    "IBAN": r"(?<!\w)[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,3})?(?!\w)",
    "card number": r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)",
    "telephone number": r"(?<![\w.])(?:(?:\+\d{1,3}[ .-]?)?\(\d{1,4}\)[ .-]?\d{2,4}(?:[ .-]\d{2,4}){0,3}"
    r"|\+\d{1,3}(?:[ .-]?\d{2,4}){2,4}|\d{2,4}(?:[ .-]\d{2,4}){2,4})(?![\w.])",
}
CHECKED: dict[str, Callable[[str], bool]] = {"card number": luhn, "IBAN": mod97}


def places(text: str) -> list[tuple[str, int, int]]:
    """(kind, start, end) of each; card numbers and IBANs pass their check."""
    found: list[tuple[str, int, int]] = []
    for kind, pattern in PERSONAL.items():
        for match in list(re.finditer(pattern, text)):
            check, (start, end) = CHECKED.get(kind), match.span()
            if check is None or check(match[0]):
                found.append((kind, start, end))
            elif kind == "IBAN":
                continue  # words may look like one
            text = text[:start] + " " * (end - start) + text[end:]  # so that no other pattern sees a part of it
    return found


def personal(text: str) -> list[tuple[str, str]]:
    """(kind, the words) of each."""
    return [(kind, text[start:end]) for kind, start, end in places(text)]
