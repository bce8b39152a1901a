"""What in a text may lead to a person; numbers with check digits against published ones."""

import time

import pytest

from rayproj.responsibility.personal import luhn, mod97, personal, places


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to a.b+c@mail.example.com now", ["e-mail address"]),
        ("host 192.168.0.255, port 80", ["IP address"]),
        ("card 4111 1111 1111 1111", ["card number"]),
        ("not a card: 4111 1111 1111 1112 0", []),
        ("+49 171 555 0123 or (030) 123 4567", ["telephone number", "telephone number"]),
        ("version 1.2.3 of 2024, 3.14159 and 1 000 000 people", []),
        ("man running: dark skin tone", []),
        ("pay to GB82 WEST 1234 5698 7654 32 or DE89370400440532013000", ["IBAN", "IBAN"]),  # ISO 13616's examples
        ("GB82 WEST 1234 5698 7654 33 is none, nor is AB12 cats cats cats cats", []),
        ("call 5551234567. Or 0171 2345678.", ["telephone number", "telephone number"]),
        ("from 2001:db8::1, at 12:30:45 or 1:2:3:4:5:6:7:8", ["IP address", "IP address"]),
        ("std::vector, cat::2 dead::1 and fe80::1:2:3:4:5:6:7:8", []),
        ("host 10.0.0.1. Then", ["IP address"]),
        ("jane@exam\u200bple.org and 4111\u200b111111111111", ["e-mail address", "card number"]),
        ("ｊａｎｅ＠ｅｘａｍｐｌｅ．ｏｒｇ", ["e-mail address"]),
        ("born 1999-12-31 or 31.12.1999, id 123456789, isbn 9780306406157", []),
    ],
)
def test_personal_data_in_texts(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in personal(text)] == kinds


def test_every_wrong_digit_is_seen() -> None:
    """As both checks promise of a single one."""
    for number, check in (("4111111111111111", luhn), ("DE89370400440532013000", mod97)):
        assert check(number)
        for place, digit in enumerate(number):
            if digit.isdigit():
                others = [number[:place] + other + number[place + 1 :] for other in "0123456789" if other != digit]
                assert not any(map(check, others)), (number, place)


def test_places_are_those_of_the_text() -> None:
    text = "mail a@b.org, then a@b.org again, or +49 171 555 0123"
    assert [text[start:end] for _, start, end in places(text)] == ["a@b.org", "a@b.org", "+49 171 555 0123"]


@pytest.mark.parametrize(
    "repeated", ["a", "a.", "a@", "a@b.", "1 ", "1", "ab12 ", "1:", "+1 23 ", "a@b.org ", "0171 2345678 "]
)
def test_time_is_linear(repeated: str) -> None:
    began = time.process_time()
    personal(repeated * (200_000 // len(repeated)))
    assert time.process_time() - began < 3, "a quadratic search takes minutes"
