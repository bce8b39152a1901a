"""What in a text may lead to a person."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv6Address

from rayproj.responsibility.reading import Reading, as_written


def luhn(number: str) -> bool:
    """Whether the last digit of a card number checks the others (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def mod97(number: str) -> bool:
    """Whether the digits after the country of an IBAN check the others (ISO 13616-1, ISO/IEC 7064 MOD 97-10)."""
    compact = "".join(number.split()).upper()
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def address(text: str) -> bool:
    """Whether colons and digits are an IPv6 address (RFC 4291), and not a time."""
    try:
        return ":" not in text or bool(IPv6Address(text))
    except AddressValueError:
        return False


# In the order in which they are looked for: a place belongs to the first kind whose pattern it has, checked or not. Nothing
# is repeated without a bound, so that the time is linear in the text's length (64 letters before an @: RFC 5321).
PERSONAL = {
    "e-mail address": r"[\w.+-]{1,64}+@[\w-]{1,63}+\.[\w.-]{0,190}\w",
    "IP address": r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\d|\.\d)"
    r"|(?<![\w:])(?:[\da-f]{1,4}::?){2,7}(?:[\da-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])",
    "IBAN": r"(?<!\w)[a-z]{2}\d{2}(?: ?[a-z\d]{4}){2,7}(?: ?[a-z\d]{1,3})?(?!\w)",
    "card number": r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)",
    # With marks, as a code after 0 and a number, or ten or eleven digits; no day such as 1999-12-31 or 31.12.1999.
    "telephone number": r"(?<!\w)(?<!\d\.)(?!\d{4}-\d\d-\d\d\b|\d\d?[./]\d\d?[./]\d{4}\b)"
    r"(?:(?:\+\d{1,3}[ .-]?)?\(\d{1,4}\)[ .-]?\d{2,4}(?:[ .-]\d{2,4}){0,3}|\+\d{1,3}(?:[ .-]?\d{2,4}){2,4}"
    r"|\d{2,4}(?:[ .-]\d{2,4}){2,4}|0\d{2,4}[ /-]\d{5,8}|\d{10,11})(?!\w|\.\d)",
}
CHECKED: dict[str, Callable[[str], bool]] = {"card number": luhn, "IBAN": mod97, "IP address": address}


def places(text: str) -> list[tuple[str, int, int]]:
    """(kind, start, end) of each, in the text with compatibility forms as what they stand for and without what nobody sees;
    card numbers, IBANs and IPv6 addresses pass their check."""
    reading = Reading(text, as_written)
    rest, found = reading.text, list[tuple[str, int, int]]()
    for kind, pattern in PERSONAL.items():

        def taken(match: re.Match[str], kind: str = kind) -> str:
            sound = kind not in CHECKED or CHECKED[kind](match[0])
            if sound:
                found.append((kind, *reading.span(*match.span())))
            # So that no other pattern sees a part of it; but words may look like an IBAN, and times like an address.
            return " " * len(match[0]) if sound or kind == "card number" else match[0]

        rest = re.sub(pattern, taken, rest, flags=re.IGNORECASE)
    return found


def personal(text: str) -> list[tuple[str, str]]:
    """(kind, the words) of each."""
    return [(kind, text[start:end]) for kind, start, end in places(text)]
