"""The benchmark's metrics: the values of its own unit test, a written-out loop, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayproj.errors import UserError
from rayproj.evaluation.obfuscations import (
    CONFLICT_STIMULI,
    Predictions,
    best,
    csv_of,
    grouped,
    in_groups,
    intervals,
    metrics,
    read_csv,
    read_csvs,
    summary,
)
from rayproj.obfuscation import CLEAN, HELD_OUT, OBFUSCATIONS, TRAINING

# google-deepmind/image_obfuscation_benchmark, eval/evaluate_lib_test.py
LABELS = [11, 440, 409, 294, 15]
GUESSES = [
    [11, 12, 9, 555, 766],
    [720, 440, 436, 281, 424],
    [404, 409, 152, 385, 386],
    [1, 2, 8, 152, 404],
    [1, 2, 15, 385, 294],
]
GROUPS = list(CONFLICT_STIMULI.values())


def test_the_values_of_the_benchmarks_own_test() -> None:
    one = Predictions(np.array(list("abcde")), np.array(LABELS), np.array(GUESSES))
    found = metrics(dict.fromkeys([CLEAN, *OBFUSCATIONS], one), label_weighted=False, top=(1, 2, 3))
    names = [CLEAN, *OBFUSCATIONS, *(f"{k}-{s}" for k in ("mean", "worst") for s in ("training", "hold-out", "all"))]
    assert found == pytest.approx({f"{name}-top-{n}": v for name in names for n, v in ((1, 0.2), (2, 0.6), (3, 0.8))})
    assert len(found) == 29 * 3


def test_class_groups_of_the_benchmarks_own_test() -> None:
    assert list(map(len, GROUPS)) == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    assert len({k for group in GROUPS for k in group}) == 207 and all(list(g) == sorted(set(g)) for g in GROUPS)
    assert in_groups(np.array([*LABELS, 0]), GROUPS).tolist() == [3, 5, 9, 1, 3, -1]
    logits = np.zeros((5, 1000))
    for row, guesses in zip(logits, GUESSES, strict=True):
        row[guesses] = [100, 90, 80, 70, 60]
    assert best(logits, 3)[:, :1].tolist() == [[11], [720], [404], [1], [1]]
    p = np.exp(logits - logits.max(1, keepdims=True))
    top = best(grouped(p / p.sum(1, keepdims=True), GROUPS), 3)
    assert top.tolist() == [[3, 15, 14], [5, 6, 7], [0, 9, 10], [3, 10, 0], [3, 11, 1]]


def drawn(names: list[str], n: int = 60, seed: int = 0) -> dict[str, Predictions]:
    rng = np.random.default_rng(seed)
    label, image = rng.integers(0, 5, n), np.array([f"{i:03d}" for i in range(n)])
    found = {}
    for name in names:
        guesses = np.stack([rng.permutation(12)[:10] for _ in range(n)])
        guesses[rng.random(n) < 0.5, 0] = -1
        right = rng.random(n) < 0.8
        guesses[right, 0] = label[right]
        order = rng.permutation(n)  # predictions come in any order
        found[name] = Predictions(image[order], label[order], guesses[order])
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_as_a_loop_would_find_them(weighted: bool) -> None:
    names = [CLEAN, *OBFUSCATIONS]
    predictions = drawn(names)
    found = metrics(predictions, weighted)
    by_image = {
        name: {i: (y, list(t)) for i, y, t in zip(p.image, p.label, p.top, strict=True)}
        for name, p in predictions.items()
    }
    labels = {i: y for i, (y, _) in by_image[CLEAN].items()}
    counts = {y: list(labels.values()).count(y) for y in labels.values()}

    def mean(right: dict[str, bool]) -> float:
        weight = {i: 1 / counts[labels[i]] if weighted else 1.0 for i in right}
        return sum(weight[i] * right[i] for i in right) / sum(weight.values())

    for n in (1, 3, 5, 10):
        right = {name: {i: y in top[:n] for i, (y, top) in rows.items()} for name, rows in by_image.items()}
        for name in names:
            assert found[f"{name}-top-{n}"] == pytest.approx(mean(right[name]))
        for title, members in (("training", TRAINING), ("hold-out", HELD_OUT), ("all", list(OBFUSCATIONS))):
            means = [mean(right[name]) for name in members]
            assert found[f"mean-{title}-top-{n}"] == pytest.approx(sum(means) / len(means))
            worst = {i: all(right[name][i] for name in members) for i in labels}
            assert found[f"worst-{title}-top-{n}"] == pytest.approx(mean(worst))
            assert found[f"worst-{title}-top-{n}"] <= min(means) + 1e-9
    balanced = drawn(names)
    same = {name: Predictions(p.image, np.zeros_like(p.label), p.top) for name, p in balanced.items()}
    assert metrics(same, True) == pytest.approx(metrics(same, False)), "of one label alone"


def test_a_part_of_the_obfuscations_is_measured_as_that_part() -> None:
    predictions = drawn([CLEAN, "Halftoning", "LineShift"])
    found = metrics(predictions)
    assert found["mean-training-top-1"] == pytest.approx((found["Halftoning-top-1"] + found["LineShift-top-1"]) / 2)
    assert "mean-hold-out-top-1" not in found and found["mean-all-top-5"] == found["mean-training-top-5"]
    assert set(summary(found)) == {CLEAN, "mean-training", "worst-training", "mean-all", "worst-all"}


def test_intervals_hold_what_a_larger_sample_shows() -> None:
    names = [CLEAN, "Halftoning", "LineShift"]
    found = intervals(drawn(names, 200), label_weighted=False)
    large = metrics(drawn(names, 20000, seed=1), label_weighted=False)
    inside = [low <= large[key] <= high for key, (low, high) in found.items()]
    assert np.mean(inside) > 0.7
    low, high = found["worst-all-top-1"]
    assert 0.05 < high - low < 0.25, "about 2 * 1.96 * sqrt(0.25 / 200)"


def test_draws_of_one_image_are_no_further_evidence() -> None:
    one = drawn([CLEAN, "Halftoning"])
    four = {
        name: Predictions(
            np.array([f"{i}#{k}" for k in range(4) for i in p.image]), np.tile(p.label, 4), np.tile(p.top, (4, 1))
        )
        for name, p in one.items()
    }
    assert intervals(four, label_weighted=False) == pytest.approx(intervals(one, label_weighted=False))


def test_predictions_of_other_images_are_refused() -> None:
    predictions = drawn([CLEAN, "Halftoning"])
    other = predictions["Halftoning"]
    for wrong in (
        Predictions(np.char.add(other.image, "x"), other.label, other.top),
        Predictions(other.image, other.label + 1, other.top),
    ):
        with pytest.raises(UserError, match="Halftoning are of other images"):
            metrics({CLEAN: predictions[CLEAN], "Halftoning": wrong})
    with pytest.raises(UserError, match="no predictions"):
        metrics({})


def test_means_are_of_what_all_models_have() -> None:
    found = drawn(["Halftoning", "SwirlWarp"])
    alone, both = metrics(found, among=["SwirlWarp"]), metrics(found)
    assert (
        alone["mean-training-top-1"] == both["SwirlWarp-top-1"]
        and alone["Halftoning-top-1"] == both["Halftoning-top-1"]
    )
    assert both["mean-training-top-1"] == pytest.approx((both["Halftoning-top-1"] + both["SwirlWarp-top-1"]) / 2)
    assert (
        intervals(found, draws=20, among=["SwirlWarp"])["mean-training-top-1"]
        == intervals(found, draws=20)["SwirlWarp-top-1"]
    )


def test_a_comma_in_a_name_goes_and_comes(tmp_path: Path) -> None:
    names = np.array(["n01/a,b.JPEG", 'c"d', "plain"])
    (tmp_path / "it.csv").write_bytes(csv_of(Predictions(names, np.arange(3), np.array([[1], [2], [3]]))))
    assert read_csv(tmp_path / "it.csv").image.tolist() == sorted(names.tolist())


def test_files_go_and_come(tmp_path: Path) -> None:
    predictions = drawn([CLEAN, "Halftoning"])
    for name, p in predictions.items():
        (tmp_path / f"{name}.csv").write_bytes(csv_of(p))
    found = read_csvs(str(tmp_path), list(OBFUSCATIONS))
    assert metrics(found) == metrics(predictions)
    # As the benchmark's script writes them, with bytes for ids and numpy's spaces.
    (tmp_path / "theirs.csv").write_text(
        "b'ILSVRC2012_val_00000001.JPEG', 65, [ 65  62 100]\nb'b.JPEG', 3, [1   3 2]\n"
    )
    theirs = read_csv(tmp_path / "theirs.csv")
    assert theirs.image.tolist() == ["ILSVRC2012_val_00000001.JPEG", "b.JPEG"]
    assert theirs.label.tolist() == [65, 3] and theirs.top.tolist() == [[65, 62, 100], [1, 3, 2]]
    (tmp_path / "broken.csv").write_text("a, b\n")
    with pytest.raises(UserError, match="holds no lines"):
        read_csv(tmp_path / "broken.csv")
    with pytest.raises(UserError, match="has no predictions such as"):
        read_csvs(str(tmp_path / "nowhere"), ["Halftoning"])
