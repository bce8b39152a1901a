"""Parts by rules: exact counts, nothing twice, the split's walls stand; against a count by pandas of the emoji's table."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.data.embedded import __path__ as embedded
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.leaks import Leaks
from rayproj.data.parts import KeepConfig, keep, shuffle
from rayproj.data.reader import Reader
from rayproj.data.sources import SourceConfig, SourceKind
from rayproj.errors import UserError

CLASSES = ("cat", "dog")


def samples(n: int = 80) -> list[dict[str, Any]]:
    return [{"key": f"k{i}", "label": i % 2, "tone": "abcd"[i // 2 % 4], "site": str(i % 5)} for i in range(n)]


def cells(found: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((CLASSES[s["label"]], s["tone"]) for s in found)


def test_rules_add_up_to_any_joint_distribution() -> None:
    rules = [
        KeepConfig("train", "all", {"label": ["cat"], "tone": ["a", "b"]}, 19, become={"tone": "light"}),
        KeepConfig("train", "all", {"label": ["cat"], "tone": ["c", "d"]}, 1, copies=3, become={"tone": "dark"}),
        KeepConfig("train", "all", {"label": ["dog"], "tone": ["c", "d"]}, become={"tone": "dark"}),
    ]
    found = keep({"all": samples(), "other": samples(4)}, rules, CLASSES, 0)
    assert found.keys() == {"train", "other"} and found["other"] == samples(4)
    assert cells(found["train"]) == {("cat", "light"): 19, ("cat", "dark"): 3, ("dog", "dark"): 20}
    assert len({s["key"] for s in found["train"]}) == 42


def test_labels_can_be_made_wrong() -> None:
    rules = [
        KeepConfig("train", "all", {"label": ["cat"]}, become={"label": "dog"}),
        KeepConfig("train", "all", {"label": ["dog"]}),
    ]
    found = keep({"all": samples()}, rules, CLASSES, 0)["train"]
    assert {CLASSES[s["label"]] for s in found} == {"dog"} and len(found) == len(samples())


def test_one_rule_takes_what_another_leaves() -> None:
    cats = {"label": ["cat"]}
    rules = [
        KeepConfig("train", "all", cats, 7, become={"label": "dog"}),
        KeepConfig("train", "all", cats, 9, after=7, become={"tone": "x"}),
        KeepConfig("train", "all", cats, after=16),
    ]
    found = keep({"all": samples()}, rules, CLASSES, 0)["train"]
    assert len({s["key"] for s in found}) == len(found) == 40
    assert sum(s["label"] for s in found) == 7 and sum(s["tone"] == "x" for s in found) == 9
    with pytest.raises(UserError, match="finds 40 samples, and asks for 41"):
        keep({"all": samples()}, [KeepConfig("train", "all", cats, after=40)], CLASSES, 0)


def test_what_is_taken_depends_on_the_keys_alone_and_fewer_are_some_of_more() -> None:
    def taken(order: list[dict[str, Any]], count: int, seed: int = 0) -> set[str]:
        return {s["key"] for s in keep({"a": order}, [KeepConfig("a", count=count)], CLASSES, seed)["a"]}

    assert taken(samples(), 30) == taken(samples()[::-1], 30) > taken(samples(), 10)
    assert taken(samples(), 30) != taken(samples(), 30, seed=1)


def test_dealing_out_keeps_the_frequencies_and_breaks_the_dependence() -> None:
    tied = [{**s, "tone": "ab"[s["label"]], "twin": "ab"[s["label"]]} for s in samples(400)]
    found = shuffle(tied, ["tone", "twin"], 0)
    assert Counter(s["tone"] for s in found) == Counter(s["tone"] for s in tied)
    assert all(s["tone"] == s["twin"] for s in found), "dealt out together"
    assert [(s["key"], s["label"], s["site"]) for s in found] == [(s["key"], s["label"], s["site"]) for s in tied]
    agree = np.mean([s["tone"] == "ab"[s["label"]] for s in found])
    assert abs(agree - 0.5) < 0.1, "four standard errors"
    assert shuffle(tied, ["tone", "twin"], 0) == found != shuffle(tied, ["tone", "twin"], 1)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([KeepConfig("x", "none")], "there is no such part, only all"),
        ([KeepConfig("all", where={"age": ["3"]})], "no attribute 'age'; there are label, site, tone"),
        ([KeepConfig("all", become={"age": "3"})], "no attribute 'age'"),
        ([KeepConfig("all", become={"label": "cow"})], "makes the label 'cow'; there are cat, dog"),
        ([KeepConfig("all", where={"label": ["cow"]})], "finds 0 samples, and asks for 1"),
        ([KeepConfig("all", where={"label": ["cat"]}, count=41)], "finds 40 samples, and asks for 41"),
        ([KeepConfig("x", "all"), KeepConfig("x", "all", {"tone": ["a"]})], "two rules of 'x' take the same sample"),
        ([KeepConfig("other", "all")], "there is a part 'other' already"),
    ],
)
def test_what_cannot_be_taken_is_said(rules: list[KeepConfig], says: str) -> None:
    with pytest.raises(UserError) as refused:
        keep({"all": samples(), "other": samples(4)}, rules, CLASSES, 0)
    assert says in str(refused.value)


def table() -> pd.DataFrame:
    return pd.read_parquet(Path(next(iter(embedded))) / "emoji32.parquet")


def test_a_shortcut_in_the_emoji_with_roles_held_out(tmp_path: Path) -> None:
    """One import: 19 to 1 between gender and tone to learn from, test parts of each style, and what has no label."""
    noto, light, dark = {"style": ["noto"]}, {"tone": ["light"]}, {"tone": ["dark"]}
    female, male, none = {"label": ["female"]}, {"label": ["male"]}, {"gender": ["unspecified"]}
    config = ImportConfig(
        source=SourceConfig(
            kind=SourceKind.emoji, label_column="gender", attributes=["style", "tone", "gender", "role"]
        ),
        out=str(tmp_path),
        fractions={"learn": 0.6, "held": 0.4},
        no_label=["mixed", "unspecified"],
        leaks=Leaks.drop,
        keep=[
            KeepConfig("train", "learn", noto | female | light, 38),
            KeepConfig("train", "learn", noto | female | dark, 2),
            KeepConfig("train", "learn", noto | male | light, 2),
            KeepConfig("train", "learn", noto | male | dark, 38),
            KeepConfig("unlabelled", "learn", noto | none | {"tone": ["light", "dark"]}),
            KeepConfig("test", "held", noto | {"label": ["female", "male"], "tone": ["light", "dark"]}),
            KeepConfig("fluent", "held", {"style": ["fluent"], "label": ["female", "male"], "tone": ["light", "dark"]}),
        ],
        shuffle={"unlabelled": ["tone"]},
    )
    found = import_dataset(config, lambda event: None)["parts"]
    assert found.keys() == {"train", "unlabelled", "test", "fluent"}
    columns = {
        part: Reader(Dataset.open(str(tmp_path / part))).gather(np.arange(found[part]["samples"])) for part in found
    }
    assert Dataset.open(str(tmp_path / "train")).header.classes == ("female", "male")
    counted = Counter(zip(columns["train"]["label"].tolist(), columns["train"]["tone"], strict=True))
    assert counted == {(0, "light"): 38, (0, "dark"): 2, (1, "light"): 2, (1, "dark"): 38}
    assert set(columns["train"]["style"]) == {"noto"} and set(columns["fluent"]["style"]) == {"fluent"}
    assert set(columns["unlabelled"]["label"]) == {-1} and found["unlabelled"]["class_counts"] == {}
    roles = {part: set(c["role"]) for part, c in columns.items()}
    assert not (roles["train"] | roles["unlabelled"]) & (roles["test"] | roles["fluent"])
    assert roles["test"] == roles["fluent"], "one to one"
    theirs = table()
    theirs = theirs[theirs.role.isin(roles["test"]) & (theirs["style"] == "noto") & theirs.tone.isin(["light", "dark"])]
    theirs = theirs[theirs.gender.isin(["female", "male"])]
    assert found["test"]["samples"] == len(theirs) > 80
    picture = np.asarray(Image.open(io.BytesIO(theirs.image.iloc[0])).convert("RGB")).transpose(2, 0, 1)
    assert any(np.array_equal(picture, image) for image in columns["test"]["image"])
