"""Counting and naming colours in drawings."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rayproj.judging.counting import BASIC, components, lab, main_colour


def drawn(count: int, colour: tuple[int, int, int], ring: bool = False, side: int = 64) -> np.ndarray:
    """So many discs or rings, apart from one another."""
    picture = Image.new("RGB", (side, side), (255, 255, 255) if min(colour) < 240 else (0, 0, 0))
    draw = ImageDraw.Draw(picture)
    for k in range(count):
        x, y = 4 + 20 * (k % 3), 4 + 20 * (k // 3)
        draw.ellipse([x, y, x + 14, y + 14], fill=None if ring else colour, outline=colour, width=2)
    return np.moveaxis(np.asarray(picture), -1, 0)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("count", range(10))
def test_things_that_are_apart_are_counted(count: int, ring: bool) -> None:
    assert components(drawn(count, (200, 30, 30), ring)) == min(count, 9)


def test_specks_are_nothing() -> None:
    image = drawn(2, (200, 30, 30)).copy()
    image[:, 60, 60] = 0
    assert components(image) == 2


@pytest.mark.parametrize("name", BASIC)
def test_the_colour_of_most_of_a_thing_has_its_name(name: str) -> None:
    shade = tuple(int(0.92 * v) for v in BASIC[name])
    assert main_colour(drawn(3, shade)) == name


def test_lab_has_the_published_values() -> None:
    found = lab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]], float))
    np.testing.assert_allclose(found, [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]], atol=0.05)
