"""What people said of models, from each of the forms in which it is kept."""

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from rayproj.errors import UserError
from rayproj.judging import people
from rayproj.judging.scoring import JudgeConfig
from rayproj.preferences.results import parquet, rows_of, summary
from tests.support.studies import simulate

JUDGED = ["a horse", "a  cat", "a dog", "a prompt that nobody was asked about"]


def asked(config: JudgeConfig, prompts: Collection[str] = tuple(JUDGED)) -> tuple[Any, Any]:
    return people.asked(config, prompts)


def config(human: str, *models: str, question: str = "alignment") -> JudgeConfig:
    return JudgeConfig(models={name: name for name in models}, human=human, question=question)


def test_a_study_its_export_and_its_counts_say_the_same(tmp_path: Path) -> None:
    _, store = simulate(tmp_path)
    rows = rows_of(store)
    (tmp_path / "ratings.parquet").write_bytes(parquet(rows))
    won = Counter[tuple[str, str, float]]()
    for row in rows:
        if row["question"] == "alignment" and row["counts"]:
            won[row["first"], row["second"], row["score"]] += 1
    pairs = sorted({(a, b) for a, b, _ in won})
    lines = [{"first": a, "second": b, "wins": won[a, b, 1.0], "losses": won[a, b, 0.0]} for a, b in pairs]
    (tmp_path / "counts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = {("a", "b"): 1, ("a", "c"): 1, ("b", "c"): 1}
    assert asked(config(store.uri, "a", "b", "c")) == (summary(rows), expected)
    assert asked(config(f"{tmp_path}/ratings.parquet", "a", "b", "c")) == (summary(rows), expected)
    assert asked(config(f"{tmp_path}/counts.jsonl", "a", "b", "c")) == (None, expected)
    found, turned = asked(config(store.uri, "c", "a"))
    assert turned == {("c", "a"): -1} and found == summary(rows), "the study has more models than are judged"
    assert asked(config("", "a")) == (None, {})


def test_only_what_was_said_of_the_judged_prompts_counts(tmp_path: Path) -> None:
    """Of one prompt a is better and of another b, each of which both sets have; and one rater, however often, is one."""
    rows = [
        {"rater": f"r{k % 12}", "set": of, "question": "alignment", "prompt": prompt, "category": "", "answer": "left"}
        | {"first": "a", "second": "b", "left": "a", "right": "b", "score": score, "counts": True}
        for k in range(48)
        for of in ("x", "y")
        for prompt, score in (("a horse", 1.0), ("a cat", 0.0))
    ]
    (tmp_path / "all.parquet").write_bytes(parquet(rows))
    (tmp_path / "one.parquet").write_bytes(parquet([{**row, "rater": "r"} for row in rows]))
    given = config(f"{tmp_path}/all.parquet", "a", "b")
    for prompts, order in (({"a horse"}, 1), ({"a  cat"}, -1), ({"a horse", "a cat"}, 0)):
        assert asked(given, prompts)[1] == {("a", "b"): order}
    assert asked(config(f"{tmp_path}/one.parquet", "a", "b"), {"a horse"})[1] == {("a", "b"): 0}
    with pytest.raises(UserError, match="on their prompts"):
        asked(given, {"a dog"})


def test_what_is_no_rating_of_these_models_is_refused(tmp_path: Path) -> None:
    _, store = simulate(tmp_path, ratings=20)
    with pytest.raises(UserError, match=r"no rating of two of these models on their prompts: a, z; .* not 'alignment'"):
        asked(config(store.uri, "a", "z"))
    with pytest.raises(UserError, match="not 'detailed'"):
        asked(config(store.uri, "a", "b", question="detailed"))
    (tmp_path / "none.parquet").write_bytes(parquet([{**row, "counts": False} for row in rows_of(store)]))
    with pytest.raises(UserError, match="no rating yet that counts"):
        asked(config(f"{tmp_path}/none.parquet", "a", "b"))
    (tmp_path / "empty.parquet").write_bytes(parquet([]))
    for path in Path(store.uri).glob("ratings/**/*.json"):
        path.unlink()
    for human in (store.uri, f"{tmp_path}/empty.parquet"):
        with pytest.raises(UserError, match="no rating yet that counts"):
            asked(config(human, "a", "b"))
    for name, text in {"wrong.jsonl": "{}", "wrong.parquet": "no", "list.jsonl": "[1]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="is neither the run of a study"):
            asked(config(str(tmp_path / name), "a", "b"))


def test_lines_of_one_pair_are_added_up_whichever_way_round(tmp_path: Path) -> None:
    file = tmp_path / "counts.jsonl"
    lines = [("a", "b", 13, 7), ("a", "b", 13, 7), ("b", "a", 7, 13), ("b", "a", 7, 13), ("b", "a", 7, 13)]
    names = ("first", "second", "wins", "losses")
    for count, order in ((1, 0), (5, 1)):  # 13 of 20 tell nothing, and 65 of 100 do
        file.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines[:count]))
        assert asked(config(str(file), "a", "b")) == (None, {("a", "b"): order})
        assert asked(config(str(file), "b", "a")) == (None, {("b", "a"): -order})
