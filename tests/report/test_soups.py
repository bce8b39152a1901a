"""Soups in a report, from outcomes that are known."""

import json
import re
from pathlib import Path

import numpy as np
import yaml

from rayproj.classifiers.soups import grid
from rayproj.report.build import build
from rayproj.report.soups import compared, front, lines, rows, trade_offs
from rayproj.robustness.job import share


def outcome(parts: int = 4) -> dict:
    """Two members: the first right without an attack, the second under it, and in the middle both."""
    weights, images = grid(2, parts), np.arange(100)
    soups = [
        {"weights": w.tolist(), "clean": share(images < 60 + 20 * w[0]), "linf": share(images < 30 + 40 * w[1])}
        for w in weights
    ]
    best = {name: int(np.argmax([s[name]["value"] for s in soups])) for name in ("clean", "linf")}
    row = {"member": "b", "alone": 0.7, "soup": 0.6, "weights": [0.5, 0.5], "only_alone": 5, "only_soup": 2, "p": 0.45}
    return {"job": "soup", "members": ["a", "b"], "soups": soups, "best": best, "greedy": 2, "seconds": 1.0,
            "ensemble": {name: share(np.arange(10) < 7) for name in best},
            "learned": {how: {"weights": w, **{name: share(np.arange(10) < 5) for name in best}}
                        for how, w in {"affine": [1.5, -0.5], "affine_by_layer": {"head": [1.0, 0.0]}}.items()},
            "beats_specialist": {"clean": {}, "linf": row}, "finished_at": 1.0, "barriers": {"a - b": 0.012},
            "few_shot": {"sketches": {"chosen": {"10": {"mean": 0.5, "std": 0.02}}, "best_member": 0.4, "best_soup": 0.6,
                                      "ensemble": 0.55, "learned": {"affine": 0.52, "affine_by_layer": 0.48}}},
            }  # fmt: skip


def test_members_and_the_best_have_rows() -> None:
    found = rows(outcome())
    titles = ["a, best clean", "b, best linf", "greedy, for the union", "learned, affine", "learned, affine by layer",
              "ensemble, 2 passes"]  # fmt: skip
    assert [title for title, _ in found] == titles
    assert found[3][1]["weights"] == [1.5, -0.5] and set(found[4][1]) == {"clean", "linf"}
    assert [one["weights"] for _, one in found[:3]] == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]


def test_lines_are_of_the_soups_between_two_members() -> None:
    three = outcome()
    three["members"] = ["a", "b", "c"]
    three["soups"] = [{"weights": w.tolist(), "clean": share(np.arange(10) < 10 * w[2])} for w in grid(3, 2)]
    first, second, third = lines(three).axes[:3]
    assert first.get_lines()[0].get_ydata().tolist() == [0, 0, 0]
    for axis in (second, third):
        assert axis.get_lines()[0].get_xdata().tolist() == axis.get_lines()[0].get_ydata().tolist() == [0, 0.5, 1]


def test_the_front_is_what_no_candidate_beats_in_both() -> None:
    points = np.random.default_rng(0).integers(0, 20, (200, 2)).astype(float)
    found = points[front(points)].tolist()
    expected = [p for p in points.tolist() if not any((points >= p).all(1) & (points > p).any(1))]
    assert found == sorted(map(list, {tuple(p) for p in expected}))


def test_members_and_their_ensemble_are_marked() -> None:
    (axis,) = [axis for axis in trade_offs(outcome()).axes if axis.get_visible()]
    assert [text.get_text() for text in axis.figure.legends[0].get_texts()] == [
        "a", "b", "learned, affine", "learned, affine by layer", "ensemble"
    ]  # fmt: skip
    ends = [container.lines[0].get_xydata()[0].tolist() for container in axis.containers]
    assert ends == [[0.8, 0.3], [0.6, 0.7], [0.5, 0.5], [0.5, 0.5], [0.7, 0.7]]


def test_sets_of_soups_are_compared_by_the_threats_that_all_have() -> None:
    two, three = outcome(), outcome()
    three["members"], images = ["a", "b", "c"], np.arange(10)
    three["soups"] = [
        {"weights": w.tolist(), **{name: share(images < 10 * w[k]) for k, name in enumerate(("clean", "linf", "l2"))}}
        for w in grid(3, 2)
    ]
    (axis,) = [axis for axis in compared({"two": two, "three": three}).axes if axis.get_visible()]
    line, *alone = [(of.get_label(), of.get_xydata().tolist()) for of in axis.get_lines()]
    assert line[0] == "two" and np.allclose(line[1], [[0.8 - k / 20, 0.3 + k / 10] for k in range(5)])
    assert alone == [("a", [[1, 0]]), ("b", [[0, 1]]), ("c", [[0, 0]])]


def test_sets_of_which_fewer_images_choose_have_empty_cells(tmp_path: Path) -> None:
    found = outcome()
    few = found["few_shot"]["sketches"]
    more = {**few, "chosen": {**few["chosen"], "200": {"mean": 0.58, "std": 0.01}}}
    found["few_shot"] = {"sketches": few, "paintings": more}
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "result.json").write_text(json.dumps(found))
    (tmp_path / "mixed" / "config.yaml").write_text(yaml.safe_dump({"soup": {}}))
    _, html = build(str(tmp_path), {})
    rows = [re.search(rf"<tr><td>{name}</td>.*?</tr>", html) for name in ("sketches", "paintings")]
    cells = [re.findall(r"<td class=\"right\">(.*?)</td>", row[0]) for row in rows if row]
    assert cells[0] == ["40.0 %", "50.0 ± 2.0 %", "", "52.0 %", "48.0 %", "60.0 %", "55.0 %"]
    assert cells[1] == ["40.0 %", "50.0 ± 2.0 %", "58.0 ± 1.0 %", "52.0 %", "48.0 %", "60.0 %", "55.0 %"]
    assert html.index("chosen by 10<") < html.index("chosen by 200<")


def test_members_that_are_not_connected_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "result.json").write_text(
        json.dumps({**outcome(), "barriers": {"a - b": 0.012, "a - c": 0.31}})
    )
    (tmp_path / "mixed" / "config.yaml").write_text(yaml.safe_dump({"soup": {}}))
    _, html = build(str(tmp_path), {})
    assert "by at most 31.0 points. They do not share what makes weights mix" in html


def test_the_report_has_table_and_plot(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(outcome()))
    (folder / "config.yaml").write_text(yaml.safe_dump({"soup": {}}))
    _, html = build(str(tmp_path), {})
    assert "images that somebody has changed on purpose?" in html and "synthetic" not in html
    assert "Soups: mixed" in html and "80.0 % (70.8–87.3)" in html, "Clopper and Pearson's interval of 80 of 100"
    assert "linf: 60.0 % (weights 0.50, 0.50) against 70.0 % of b, p 0.45" in html
    assert "by at most 1.2 points" in html and "judge no soup by its members" not in html
    row = re.search(r"<tr><td>sketches</td>.*?</tr>", html)
    assert row and re.findall(r"[\d.]+(?: ± [\d.]+)? %", row[0]) == [
        "40.0 %",
        "50.0 ± 2.0 %",
        "52.0 %",
        "48.0 %",
        "60.0 %",
        "55.0 %",
    ]
    assert 'alt="Accuracy under attack over accuracy without one"' in html
    assert 'alt="Accuracies along the lines between two members"' in html
