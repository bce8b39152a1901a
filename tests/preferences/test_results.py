"""The table of ratings and the numbers of the report, against ratings whose makers are known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayproj import cli
from rayproj.errors import UserError
from rayproj.evaluation.proportions import Rate
from rayproj.preferences import ratings, results
from rayproj.preferences.plan import Question
from rayproj.preferences.ratings import Rating
from rayproj.report.preferences import page
from rayproj.storage.store import Store, to_json
from tests.support.studies import STRENGTHS, made, simulate


def test_the_table_says_what_was_compared_and_what_counts(tmp_path: Path) -> None:
    of, store = simulate(tmp_path)
    rows = pq.read_table(io.BytesIO(results.parquet(results.rows_of(store)))).to_pylist()
    assert len(rows) == len(store.list("ratings"))
    counting = [row for row in rows if row["counts"]]
    assert [row["slot"] for row in counting] == list(range(of.slots))
    assert {row["rater"] for row in rows if not row["counts"]} == {"r9999"}
    for row in rows:
        task = of.task(row["slot"])
        shown = [row["left"]] if task.question is Question.count else [row["left"], row["right"]]
        assert tuple(shown) == task.models and row["prompt"] == task.prompt.text
        if task.question is Question.count:
            assert row["score"] == (row["number"] == row["wanted"]) and row["second"] == ""
        else:
            chosen = {"left": row["left"], "right": row["right"]}.get(row["answer"])
            assert row["score"] == (0.5 if chosen is None else float(chosen == row["first"]))
            assert row["first"] < row["second"]


def test_the_report_finds_the_strengths_and_leaves_out_who_did_not_attend(tmp_path: Path) -> None:
    of, store = simulate(tmp_path)
    found = results.summary(results.rows_of(store), replicates=200)
    assert found["ratings"] == of.slots and found["left_out"] == {"ratings": of.slots / 40, "raters": 1}
    by = {(r["set"], r["question"]): r for r in found["results"]}
    assert list(by) == [("p", "overall"), ("p", "appeal"), ("p", "count"), ("q", "alignment")]
    for key, result in by.items():
        if key[1] == "count":
            shares = {name: row["value"] for name, row in result["models"].items()}
            assert list(shares) == ["a", "b", "c"] and abs(shares["a"] - 0.9) < 0.1 and abs(shares["c"] - 0.5) < 0.15
            # Of seven prompts there are seven images of a model, too few for an interval over them.
            assert all((row["of"], row["images"], row["low"]) == (150, 7, None) for row in result["models"].values())
            continue
        assert list(result["models"]) == ["a", "b", "c"], "the best first"
        values = {name: row["elo"] for name, row in result["models"].items()}
        assert abs(sum(values.values()) - 3000) < 1e-6
        for name, row in result["models"].items():
            assert row["low"] < row["elo"] < row["high"] and row["high"] - row["low"] < 160
            # A tenth is indifferent, which as half wins draws strengths together; modelled apart it does not.
            assert abs(row["ties_modelled"] - 1000 - 400 / np.log(10) * STRENGTHS[name]) < 75
        assert result["win_rates"]["a"]["c"] + result["win_rates"]["c"]["a"] == pytest.approx(1)
        assert sum(n for row in result["met"].values() for n in row.values()) == 2 * result["ratings"]
        assert 0.03 < result["indifferent"] < 0.2 and result["left"]["low"] < 0.5 < result["left"]["high"]
        assert result["agreement"]["images"] > 0 and 0.03 < result["agreement"]["alpha"] < 0.4
    categories = by["p", "overall"]["categories"]
    assert set(categories) == {"c0", "c1"} and sum(c["ratings"] for c in categories.values()) == 450
    assert not by["q", "alignment"]["categories"], "one category is none"


def rated(rater: str, prompt: str, score: float, question: str = "overall", category: str = "") -> results.Row:
    """A rating of a against b, or of how many things an image of a shows."""
    counting = question == "count"
    row = {"rater": rater, "set": "p", "question": question, "prompt": prompt, "category": category, "counts": True}
    row |= {"first": "a", "second": "" if counting else "b", "score": score, "number": int(score), "wanted": 1}
    return row | {"answer": {0: "right", 0.5: "indifferent", 1: "left"}[score]}


def test_few_raters_have_no_interval_also_beside_many() -> None:
    """By question and by category; nor have raters who all say the same, whose draws are all alike."""
    many = [rated(f"r{k}", f"p{k}", float(k % 3 > 0), "overall", "few" if k < 4 else "many") for k in range(30)]
    one = [rated("r0", f"p{k}", float(k % 3 > 0), "appeal") for k in range(30)]
    alike = [rated(f"r{k}", f"p{k}", 1.0, "alignment") for k in range(12)]
    found = results.summary([*many, *one, *alike], replicates=50)
    by = {result["question"]: result for result in found["results"]}
    for row in by["overall"]["models"].values():
        assert row["low"] < row["elo"] < row["high"]
    few, enough = by["overall"]["categories"]["few"], by["overall"]["categories"]["many"]
    assert (few["raters"], enough["raters"]) == (4, 26)
    for models in (by["appeal"]["models"], by["alignment"]["models"], few["models"]):
        assert {(row["low"], row["high"]) for row in models.values()} == {(None, None)}
    assert all(row["low"] < row["high"] for row in enough["models"].values())
    assert by["appeal"]["left"]["low"] is None and by["alignment"]["left"] == {
        "of": 12, "value": 1.0, "low": Rate(12, 12).interval(0.99)[0], "high": 1.0
    }  # fmt: skip
    html = page(found)
    assert html.count("With so few raters there is no interval.") == 2, "one question and one category"
    assert html.count("With so few raters the intervals are too narrow.") == 1, "of twelve"
    elo = by["appeal"]["models"]["a"]["elo"]
    assert f'<td>a</td><td class="right">{elo:.0f} (–)</td>' in html


def test_ratings_of_counts_are_told_from_images_and_those_of_one_image_are_alike() -> None:
    """Of two images, however often rated, there is no interval; of twenty, half of them right, that of ten of twenty."""
    two = [rated(f"r{k}", f"p{k % 2}", 1.0, "count") for k in range(200)]
    row = results.summary(two)["results"][0]["models"]["a"]
    assert row == {"of": 200, "images": 2, "value": 1.0, "low": None, "high": None}
    twenty = [rated(f"r{k}", f"p{k % 20}", float(k % 2), "count") for k in range(400)]
    found = results.summary(twenty)
    row = found["results"][0]["models"]["a"]
    assert (row["of"], row["images"], row["value"]) == (400, 20, 0.5)
    assert (row["low"], row["high"]) == pytest.approx(Rate(10, 20).interval(0.99), abs=0.04)
    cells = '</td><td class="right">'.join(["", "400", "20"])
    assert f"{cells}</td></tr>" in page(found)


def test_without_ratings_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rating yet"):
        results.summary([])


def test_a_model_is_added_by_few_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`rayproj study add`: the best first; then, with that study beside the others, who is left."""
    _, store = simulate(tmp_path)
    assert cli.main(["study", "add", "new", store.uri]) == 0
    assert capsys.readouterr().out == "study.pairs=[[new, a]]\n"
    more = tmp_path / "more"
    more.mkdir()
    models = {name: name for name in ("a", "b", "c")}
    of = made(more, ratings=60, models={**models, "new": "new"}, pairs=[["a", "new"]])
    second = Store(f"{more}/run")
    second.put_once("study.json", to_json(of.to_dict()))
    for slot in range(of.slots):
        task = of.task(slot)
        if task.question is not Question.count:
            ratings.put(second, Rating(f"r{slot % 9:04d}", False, slot, "left", 1.0, 0.0))  # half of the wins for each
    assert cli.main(["study", "add", "new", store.uri, second.uri]) == 0
    assert capsys.readouterr().out == "study.pairs=[[new, b], [new, c]]\n"
    both = results.together([store.uri, second.uri])
    assert {row["rater"][:2] for row in both} == {"0/", "1/"}
    found = results.summary(both, replicates=50)
    assert set(found["results"][0]["models"]) == {"a", "b", "c", "new"}


def test_studies_that_call_other_images_by_one_name_are_not_put_together(tmp_path: Path) -> None:
    of, store = made(tmp_path), Store(f"{tmp_path}/run")
    store.put_once("study.json", to_json(of.to_dict()))
    redrawn, more = Store(f"{tmp_path}/redrawn"), Store(f"{tmp_path}/more")
    redrawn.put_once("study.json", to_json({**of.to_dict(), "models": {**of.models, "b": "drawn anew"}}))
    more.put_once("study.json", to_json({**of.to_dict(), "models": {**of.models, "d": "another"}}))
    assert results.together([store.uri, more.uri]) == []
    for ask in (results.together, lambda uris: results.pairs_to_add(uris, "a")):
        with pytest.raises(UserError, match=rf"'{more.uri}' and '{redrawn.uri}' each call other images 'b'"):
            ask([more.uri, store.uri, redrawn.uri])


def test_the_commands_write_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of, store = simulate(tmp_path)
    assert cli.main(["study", "export", store.uri, "--to", f"{tmp_path}/r.parquet"]) == 0
    assert f"{of.slots} count" in capsys.readouterr().out and pq.read_table(f"{tmp_path}/r.parquet").num_rows > of.slots
    assert cli.main(["study", "tokens", store.uri, "--raters", "2", "--address", "https://study.example/"]) == 0
    lines = capsys.readouterr().out.split()
    assert len(lines) == 2 and all(line.startswith("https://study.example/#token=r1000") for line in lines), (
        "after r9999"
    )
    assert cli.main(["study", "report", store.uri, "--to", f"{tmp_path}/out", "--bootstraps", "50"]) == 0
    assert "Overall preference" in (tmp_path / "out" / "preferences.html").read_text()
    assert cli.main(["study", "tokens", f"{tmp_path}/none", "--raters", "2"]) == 2
    assert "There is no study" in capsys.readouterr().err
