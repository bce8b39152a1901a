"""Attacked classifiers and defences in a report, from outcomes that are known."""

from typing import Any

import numpy as np

from rayproj.report.robustness import defences_attacked, perturbed, robust_accuracy, robustness_and_cost
from rayproj.robustness.job import share


def right(percent: int) -> dict[str, float]:
    return share(np.arange(100) < percent)


def found() -> dict[str, Any]:
    """A classifier that holds nothing at its radius, and a defence around it that holds a half in thrice the time."""
    plain = {"threat": {"eps": 0.2}, "robust": right(0), "curve": [{"radius": 0.1, **right(30)}]}
    defended = {
        "threat": {"eps": 0.2}, "robust": right(50), "curve": [{"radius": 0.1, **right(70)}],
        "columns": {"static": right(0), "direct": right(60)},
        "queries": {"square": [{"queries": q, **right(90 - q)} for q in (0, 10, 20)]},
        "defence_steps": [{"steps": n, **right(50 + n)} for n in (1, 2)],
    }  # fmt: skip
    return {
        "plain": {"clean": right(90), "threats": {"linf": plain}},
        "guarded": {"clean": right(80), "threats": {"linf": defended}, "cost": {"seconds": [2.0, 6.0]}},
    }


def test_accuracy_over_the_radius_begins_without_an_attack() -> None:
    axis = robust_accuracy(found()).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines() if line.get_marker() == "o"}
    assert {name: line.get_ydata().tolist() for name, line in lines.items()} == {
        "plain": [0.9, 0.3],
        "guarded": [0.8, 0.7],
    }
    assert lines["plain"].get_xdata().tolist() == [0.0, 0.1]
    assert [lines[name].get_linestyle() for name in ("plain", "guarded")] == ["-", "--"]
    crosses = [line.get_xydata().tolist() for line in axis.get_lines() if line.get_marker() == "x"]
    assert crosses == [[[0.2, 0.0]], [[0.2, 0.5]]]


def test_a_defence_stands_at_what_it_costs_beside_its_base_at_one() -> None:
    ends = [line for line in robustness_and_cost(found()).axes[0].get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xydata().tolist() for line in ends] == [[[1.0, 0.0], [3.0, 0.5]]]


def test_a_defence_has_a_bar_for_each_attack_and_the_worst_case() -> None:
    by_attack, by_queries, by_steps = defences_attacked({"guarded": found()["guarded"]}).axes
    assert [bar.get_height() for bar in by_attack.patches] == [0.0, 0.6, 0.5]
    assert [label.get_text() for label in by_attack.get_xticklabels()] == ["static", "direct", "worst case"]
    assert by_queries.get_lines()[0].get_xydata().tolist() == [[0, 0.9], [10, 0.8], [20, 0.7]]
    assert by_steps.get_lines()[0].get_xydata().tolist() == [[1, 0.51], [2, 0.52]]


def test_a_difference_is_magnified_until_its_largest_value_is_at_the_edge() -> None:
    before = np.full((1, 1, 2, 2), 0.5, np.float32)
    after = before + np.float32([[[[0.1, -0.05], [0.0, 0.05]]]])
    figure = perturbed({"plain, linf": (before, after, ["cat"])})
    shown = [axis.get_images()[0].get_array() for axis in figure.axes]
    assert np.allclose(shown[0], 0.5) and np.allclose(shown[1], after[0, 0])
    assert np.allclose(shown[2], [[1.0, 0.25], [0.5, 0.75]], atol=1e-6)
    assert figure.axes[2].get_title() == "× 5"
