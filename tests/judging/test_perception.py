"""Shares without a classifier's mistakes, against closed forms and planted shares."""

from pathlib import Path

import numpy as np
import pytest

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.errors import UserError
from rayproj.evaluation.models import ExaminedConfig
from rayproj.judging import perception
from rayproj.judging.perception import adjusted, described, likeliest, opened
from rayproj.storage.store import Store


def by_image(matrix: np.ndarray) -> np.ndarray:
    """A table for each of the images that a confusion counts."""
    places = np.repeat(np.arange(matrix.size), matrix.ravel())
    return np.eye(matrix.size, dtype=np.int64)[places].reshape(-1, *matrix.shape)


@pytest.mark.parametrize("kinds", [2, 3, 6])
def test_planted_shares_come_back_through_a_known_matrix(kinds: int) -> None:
    rng = np.random.default_rng(kinds)
    given = 0.6 * np.eye(kinds) + 0.4 * rng.dirichlet(np.ones(kinds), kinds)
    share = rng.dirichlet(np.full(kinds, 3.0), 5)
    assert np.abs(likeliest(1e6 * share @ given, given) - share).max() < 1e-4
    each = likeliest(1e6 * share @ given, np.broadcast_to(50 * given, (5, kinds, kinds)))
    assert np.abs(each - share).max() < 1e-4, "many at once, and counts in the place of shares"


@pytest.mark.parametrize("recall", [0.52, 0.6, 0.8])
def test_a_weak_classifiers_mistakes_are_taken_out_up_to_the_edge(recall: float) -> None:
    for kinds in (2, 4):
        given = np.full((kinds, kinds), (1 - recall) / (kinds - 1))
        np.fill_diagonal(given, recall)
        share = np.eye(kinds)[0]
        assert np.abs(likeliest(1e6 * share @ given, given) - share).max() < 2e-3


def test_intervals_are_over_what_belongs_together() -> None:
    """Ten images each of 40 figures, all right or all wrong: the interval is that of 40, not of 400; and it covers."""
    rng, held, wide = np.random.default_rng(0), 0, []
    for seed in range(100):
        right = rng.random(40) < 0.8
        tables = np.stack([10 * np.array([[r, not r], [0, 0]], np.int64) for r in right])
        told = described(tables, ("a", "b"), seed)
        held += told["low"] <= 0.8 <= told["high"]
        wide.append(told["high"] - told["low"])
        assert (told["n"], told["groups"]) == (400, 40) and told["recall"]["a"]["low"] == told["low"]
    assert held >= 86, "of 95: that fewer do has a chance of 0.1 %"
    assert np.mean(wide) == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 40), rel=0.1)


@pytest.mark.parametrize("perceived", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_two_kinds_are_rogan_and_gladen(perceived: float) -> None:
    """(p + specificity - 1) / (sensitivity + specificity - 1), within 0 and 1."""
    sensitivity, specificity = 0.9, 0.8
    matrix = np.array([[sensitivity, 1 - sensitivity], [1 - specificity, specificity]])
    expected = np.clip((perceived + specificity - 1) / (sensitivity + specificity - 1), 0, 1)
    assert likeliest(np.array([perceived, 1 - perceived]), matrix)[0] == pytest.approx(expected, abs=1e-9)


def test_intervals_hold_the_planted_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 60 sets in 95 %: that fewer than 51 do has a chance of 0.1 %."""
    monkeypatch.setattr(perception, "DRAWS", 200)
    rng, share = np.random.default_rng(0), np.array([0.2, 0.3, 0.5])
    given = np.array([[0.8, 0.1, 0.1], [0.05, 0.9, 0.05], [0.2, 0.1, 0.7]])
    prompt, held, raw = np.arange(300) // 4, np.zeros(3, int), np.zeros(3, int)
    for seed in range(60):
        kind = np.array([rng.choice(3, p=given[k]) for k in rng.choice(3, 300, p=share)])
        matrix = np.stack([rng.multinomial(n, row) for n, row in zip((60, 80, 100), given, strict=True)])
        found = adjusted(kind, prompt, by_image(matrix), seed)
        assert found is not None
        held += [of["low"] <= s <= of["high"] for of, s in zip(found, share, strict=True)]
        raw += np.abs(np.bincount(kind, minlength=3) / 300 - share) < 1.96 * np.sqrt(share * (1 - share) / 300)
    assert held.min() >= 51 and raw.min() < 30, "and what is perceived is off"


def test_kinds_that_are_not_told_apart_are_not_adjusted() -> None:
    kind, prompt = np.array([0, 1, 1, 0]), np.array(["a", "a", "b", "b"])
    assert adjusted(kind, prompt, by_image(np.array([[5, 5], [50, 50]]))) is None, "it guesses"
    assert adjusted(kind, prompt, by_image(np.array([[5, 5], [0, 0]]))) is None, "no image of one kind"
    told = described(by_image(np.array([[5, 5], [0, 0]])), ("a", "b"))
    assert told["value"] == 0.5 and told["recall"]["b"] == {"of": 0, "share": None, "low": 0.0, "high": 1.0}


def test_images_that_it_learned_from_are_refused(tmp_path: Path) -> None:
    people = Dataset.create(f"{tmp_path}/people", Header("x", {"label": Field("int")}, 1, 1, ("a",)))
    alone = "start: {run: '', soup: {}}"
    for name, said in {
        "run": f"{{data: {people.uri}/, mix: {{}}, {alone}}}",
        "mixed": f"{{data: other, mix: {{{people.uri}: 0.5}}, {alone}}}",
        "later": f"{{data: other, mix: {{}}, start: {{run: {tmp_path}/mixed, soup: {{}}}}}}",
    }.items():
        Store(f"{tmp_path}/{name}").write("config.yaml", said.encode())
        with pytest.raises(UserError, match=r"learned from '.*people'; give images that it has not seen"):
            opened(ExaminedConfig(f"{tmp_path}/{name}"), people.uri)
