"""The page of a study shows what was found, also where little was."""

from __future__ import annotations

from pathlib import Path

from rayproj.preferences import results
from rayproj.report.preferences import page
from tests.support.studies import simulate


def test_every_question_model_and_category_is_shown(tmp_path: Path) -> None:
    _, store = simulate(tmp_path)
    rows = results.rows_of(store)
    found = results.summary(rows, replicates=50)
    html = page(found)
    assert html.count("<h2>") == 4 and "Exact number of objects, p" in html and "data:image/svg+xml" in html
    for name, row in found["results"][0]["models"].items():
        assert f"<td>{name}</td>" in html and f"{row['elo']:.0f} (" in html
    assert "<td>c0</td>" in html and "Krippendorff" in html and "too narrow" not in html
    few = [{**row, "prompt": "<script>", "first": "<b>", "second": "c"} for row in rows if row["question"] == "overall"]
    sparse = page(results.summary(few[:2], replicates=20))
    assert "<b>" not in sparse and "With so few raters there is no interval." in sparse


def test_models_that_never_met_are_said_to_be_none_to_rank(tmp_path: Path) -> None:
    _, store = simulate(tmp_path)
    rows = [row for row in results.rows_of(store) if row["question"] == "overall" and row["counts"]][:2]
    apart = [{**row, "first": a, "second": b} for row, (a, b) in zip(rows, ("ab", "cd"), strict=True)]
    assert "cannot be ranked together" in page(results.summary(apart, replicates=20))
