"""The page and the issues of a search, from its result and datasets alone."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.evaluation.proportions import Rate
from rayproj.report.failures import issues, page, predictions, title

CLASSES = ("cat", "<dog>")


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    """A search with one finding, that never fails elsewhere."""
    fields = {
        "image": Field("png", (3, 8, 8)),
        "label": Field("int"),
        "predicted_classifier": Field("int", values=CLASSES),
    }
    dataset = Dataset.create(str(tmp_path), Header("t", {**fields, "confidence": Field("float")}, 4, 4, CLASSES))
    said = {"label": 0, "confidence": 0.9}
    samples = [
        {"key": str(i), "image": np.full((3, 8, 8), i, np.uint8), "predicted_classifier": i % 2, **said}
        for i in range(4)
    ]
    commit_shard(dataset, 0, samples, "test", 0.0)
    own, base = Rate(2, 4).described(), Rate(0, 4).described()
    finding = {
        "name": "cat, style=<b>", "slice": ["cat", [["style", "<b>"], ["", "on grass"]]], "label": "cat", "wrong": "<dog>",
        "rate": own, "base_rate": base, "ratio": {"value": None, "low": 0.1, "high": None}, "p": 0.2, "q": 0.3,
        "hypotheses": 1, "by_any_class": True, "confused": {"<dog>": 2}, "prompt": "a cat",
        "failures": [[dataset.uri, 3], [dataset.uri, 1]],
        "right": [[dataset.uri, 0], [dataset.uri, 2]],
        "others": {"elder": {"slice": own, "base": base, "p": 0.2}}, "captions": {}, "label_doubted": None,
    }  # fmt: skip
    return {
        "findings": [finding], "tested": [], "base": {"cat": base}, "images": 8, "budget": 10, "level": 0.5, "stages": {},
        "clusters": [], "classifier": "a run", "classes": list(CLASSES),
    }  # fmt: skip


def test_an_issue_says_what_a_tracker_needs(found: dict[str, Any]) -> None:
    issue = issues(found)["issues"][0]
    assert issue["title"] == title(found["findings"][0]) == (
        "cat with 'on grass' and style=<b> is misclassified, mostly as <dog>, which cat as such never is"
    )  # fmt: skip
    by_one = {**found["findings"][0], "by_any_class": False, "ratio_as": {"value": 3.0, "low": 1.1, "high": 9.0}}
    assert title(by_one).endswith("and style=<b> is taken for <dog>, 3.0 times as often as cat as such")
    low, high = Rate(2, 4).interval()
    assert (
        f"50.0 % ({100 * low:.1f}–{100 * high:.1f})" in issue["body"] and "q = 0.3 over 1 hypotheses" in issue["body"]
    )
    assert "- elder fails on 50.0 %" in issue["body"] and "samples 3, 1" in issue["body"]
    assert issue["statistics"]["rate"]["failures"] == 2 and issue["labels"] == ["model-failure", "cat", "<dog>"]


def test_the_page_needs_no_other_file_and_shows_names_as_they_are(found: dict[str, Any]) -> None:
    html = page(found)
    assert html.count("data:image/png;base64,") == 4 and "&lt;dog&gt; 0.90" in html and "<dog>" not in html
    assert "1 were tested, and 1 is a finding" in html and "∞ (0.10–∞)" in html
    assert "none are findings" in page({**found, "findings": []})


def test_the_table_for_skewsize_is_of_the_first_looks_also_if_one_is_empty(tmp_path: Path) -> None:
    def stage(name: str, slices: list[Any]) -> dict[str, Any]:
        fields = {"label": Field("int"), "predicted_classifier": Field("int", values=("cat", "dog"))}
        said = {"slices": slices, "examine": {"attributes": {"style": ["flat", "round"]}}}
        count = sum(n for _, n in slices)
        dataset = Dataset.create(f"{tmp_path}/{name}", Header(name, fields, count, 8, ("dog", "cat"), provenance=said))
        for shard in range(dataset.header.num_shards):
            commit_shard(
                dataset,
                shard,
                [{"key": str(i), "label": 1, "predicted_classifier": i % 2} for i in range(count)],
                "t",
                0.0,
            )
        return {"dataset": dataset.uri, "images": count}

    looks = [[["cat", [["style", "flat"]]], 2], [["cat", [["style", "round"]]], 1]]
    stages = {"look-1": stage("look-1", looks), "closer-2": stage("closer-2", looks), "look-2": stage("look-2", [])}
    table = parquet.read_table(io.BytesIO(predictions({"stages": stages}))).to_pydict()
    assert table == {"style": ["flat", "flat", "round"], "label": ["cat"] * 3, "prediction": ["cat", "dog", "cat"]}
