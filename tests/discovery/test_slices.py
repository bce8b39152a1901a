"""Slices and the phrases that they are described by."""

from rayproj.discovery.slices import Slice, Term, described, phrases


def test_a_slice_is_the_same_in_any_order_and_from_its_json() -> None:
    terms = [Term("tone", "dark"), Term("", "on grass"), Term("style", "noto")]
    one, other = Slice.of("cat", terms), Slice.of("cat", reversed(terms))
    assert one == other == Slice.from_json(one.to_json())
    assert one.name == "cat, 'on grass', style=noto, tone=dark"
    assert one.values == {"tone": "dark", "style": "noto"} and one.phrases == ["on grass"]
    assert [s.name for s in Slice.of("cat", terms[:2]).shorter()] == ["cat, tone=dark", "cat, 'on grass'"]
    assert Slice("cat").shorter() == Slice.of("cat", terms[:1]).shorter() == [], "the label itself is no slice"


def test_phrases_of_a_description() -> None:
    found = phrases("Woman with a Bow: medium-dark skin tone")
    assert found == {
        "woman",
        "bow",
        "medium-dark",
        "skin",
        "tone",
        "medium-dark skin",
        "skin tone",
        "medium-dark skin tone",
    }
    assert phrases("") == phrases(" , of the") == frozenset()
    assert "cup of tea" in phrases("a cup of tea") and "cup of" not in phrases("a cup of tea")


def test_what_the_label_says_is_no_description() -> None:
    assert described("a red fire truck", "fire truck") == {
        Term("", text) for text in ("red", "red fire", "red fire truck")
    }
