"""The search on real classifiers of real images: planted bugs are found by their names within a budget, a classifier without
one yields nothing, and a search that is stopped and started again ends the same."""

import dataclasses
import io
import json
import re
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import nn

from rayproj import config as configuration
from rayproj.curation.scorers import RuleConfig, Scorer, scorer
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.discovery import loop
from rayproj.discovery.adversarial import scaled_up, seen, until_full
from rayproj.discovery.examine import OWN, Results
from rayproj.discovery.generators import Asked, GeneratorConfig, open_generator
from rayproj.discovery.loop import alike, confirmed, counterfactuals, discover
from rayproj.discovery.propose import Proposal
from rayproj.discovery.search import DiscoverConfig, prepared
from rayproj.discovery.slices import Slice, Term
from rayproj.errors import UserError
from rayproj.evaluation.proportions import Rate
from rayproj.evaluation.skewsize import skewsize
from rayproj.report.failures import issues, page, predictions
from rayproj.storage.store import to_json
from rayproj.synthesis.gate import withheld
from tests.support import pipelines, planted

ATTRIBUTES: dict[str, list[str]] = {"tone": [], "style": [], "background": []}
BUDGET = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test figures as a dataset, and classifiers: without a bug, and with that of a background."""
    path = tmp_path_factory.mktemp("planted")
    planted.write(str(path / "figures"), planted.figures("test", 99))
    for bug in ("", "background"):
        planted.train(path / f"{bug or 'clean'}.pt", bug)
    return path


def test_a_picture_is_in_the_adversarial_dataset_once_though_two_slices_cover_it(folder: Path, tmp_path: Path) -> None:
    given = config(folder, "background", tmp_path / "out", scale_up=200)
    search = prepared(given, 0, planted.make)
    green = Slice.of("female", [Term("background", "green")])
    light = Slice.of("female", [Term("background", "green"), Term("tone", search.bench.attributes["tone"][0])])
    more = scaled_up(search, [green, light])
    rows = [int(row) for row in search.done[-1].rows]
    assert len(set(rows)) == len(rows) == more["images"] and more["slices"].keys() == {green.name, light.name}
    failures = Dataset.open(more["dataset"])
    kept = Reader(failures, ["row"]).gather(np.arange(more["failures"]))["row"].tolist()
    assert len(set(kept)) == len(kept) == more["failures"] > 0


def test_the_stability_of_an_answers_clusters_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty failures of one label and answer, in five clusters, of which each tells the same stability."""
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    shown = Results(
        SimpleNamespace(header=SimpleNamespace(provenance={"stage": "look-1"})),  # type: ignore[arg-type]
        [Slice("cat")] * 60, {OWN: np.full(60, "dog", object)}, {OWN: np.ones(60, bool)}, [frozenset()] * 60,
        np.full(60, "", object), features, np.full(60, -1), np.ones(60), [("a", i) for i in range(60)],
    )  # fmt: skip
    sizes, real = list[int](), loop.stability

    def counted(of: np.ndarray) -> float:
        sizes.append(len(of))
        return real(of)

    monkeypatch.setattr(loop, "stability", counted)
    found = alike([shown])
    assert len(found) == 5 and sizes == [60] and {one["stability"] for one in found} == {real(features)}


def config(folder: Path, name: str, out: Path, **changes: Any) -> DiscoverConfig:
    known = {"classes": list(planted.LABELS), "probabilities": True}
    values = {
        "classifier": {"model": str(folder / f"{name}.pt"), **known},
        "generator": {"images": str(folder / "figures"), "group": "role"},
        "out": str(out),
        "images": BUDGET,
        "words": False,
        "attributes": ATTRIBUTES,
    }
    others = {n: {"model": str(folder / f"{n}.pt"), **known} for n in changes.pop("others", [])}
    return configuration.from_dict(DiscoverConfig, {**values, "others": others, **changes})


def drawn(out: Path) -> int:
    """Images in all stages of a search."""
    stages = [path for path in out.iterdir() if path.name.startswith(("look", "closer", "confirm"))]
    return sum(Dataset.open(str(path)).header.num_samples for path in stages)


def test_a_background_is_found_by_name_with_a_page_issues_and_an_adversarial_dataset(
    folder: Path, tmp_path: Path
) -> None:
    labels = dict.fromkeys(reversed(planted.LABELS), "")  # another order than the classifier's
    given = config(folder, "background", tmp_path / "out", others=["clean"], scale_up=60, quota=60, labels=labels)
    found = discover(given, 0, planted.make)
    first = found["findings"][0]
    assert first["slice"] == ["female", [["background", "green"]]] and first["wrong"] == "male"
    assert first["rate"]["low"] > first["base_rate"]["high"] and first["q"] <= 0.05 < first["others"]["clean"]["p"]
    assert found["images"] == drawn(tmp_path / "out") <= BUDGET

    # What it says can be counted again from the dataset of the confirming images, which are of other roles than the rest.
    confirm = Dataset.open(first["failures"][0][0])
    columns = Reader(confirm).gather(np.arange(confirm.header.num_samples))
    at = columns["slice"] == confirm.header.provenance["slices"].index([first["slice"], first["rate"]["images"]])
    assert set(columns["background"][at]) == {"green"} and (columns["label"][at] == 1).all()
    assert (columns["predicted_classifier"][at] != planted.LABELS.index("female")).sum() == first["rate"]["failures"]
    figures, roles = Reader(Dataset.open(str(folder / "figures")), ["role"]), []
    for name in ("look-1", "closer-2", "confirm"):
        rows = Dataset.open(str(tmp_path / "out" / name)).header.provenance["rows"]
        roles.append(set(figures.gather(np.array(rows))["role"]))
    assert not (roles[0] | roles[1]) & roles[2]

    more = found["adversarial"]
    failures = Dataset.open(more["dataset"])
    assert failures.header.num_samples == more["failures"] and 0 < more["failures"] <= more["images"] <= 60
    wrong = Reader(failures, ["label", "slice", "predicted_classifier", "row"]).gather(np.arange(more["failures"]))
    named = [failures.header.provenance["slices"][i][0] for i in wrong["slice"]]
    assert failures.header.classes == planted.LABELS and [planted.LABELS[i] for i in wrong["label"]] == named
    assert (wrong["label"] != wrong["predicted_classifier"]).all()
    assert not set(wrong["row"]) & set(columns["row"]), "further images"
    assert more["transfer"]["classifier"]["adversarial"]["rate"] == 1 > more["transfer"]["clean"]["adversarial"]["rate"]

    issue = issues(found)["issues"][0]
    assert issue["title"].startswith("female with background=green is misclassified, mostly as male, ")
    assert f"q = {first['q']:.3g}" in issue["body"] and issue["labels"] == ["model-failure", "female", "male"]
    table = parquet.read_table(io.BytesIO(predictions(found)))
    assert table.num_rows == sum(stage["images"] for name, stage in found["stages"].items() if name.startswith("look"))
    numbers = ([planted.LABELS.index(name) for name in table[column].to_pylist()] for column in ("label", "prediction"))
    label, answer = map(np.array, numbers)
    green = np.array(table["background"]) == "green"
    female, wrong = label == planted.LABELS.index("female"), label != answer
    assert wrong[female & green].mean() > 2 * wrong[female & ~green].mean()
    effects = skewsize(label, answer, np.array(table["background"], object), planted.LABELS)["effects"]
    assert effects["female"] > 0.3
    html = page(found)
    missing = 60 * len(found["findings"]) - more["failures"]
    assert missing == sum(map(int, re.findall(r"not filled: (\d+) are missing", html)))
    assert html.count("<section") == len(found["findings"]) and html.count("data:image/png;base64,") >= 12
    assert "<link" not in html and "<script" not in html and "src=\"http" not in html  # fmt: skip


@pytest.mark.parametrize(
    "bug, changes, value",
    [
        ("background", {"words": True, "attributes": {}}, "green"),  # open-ended, by the captions of the figures
        pytest.param("tone", {"words": True, "attributes": {}}, "dark", marks=pytest.mark.slow),
        pytest.param("tone", {}, "dark", marks=pytest.mark.slow),
        pytest.param("style", {}, "openmoji", marks=pytest.mark.slow),
    ],
)
def test_a_shortcut_is_found_by_name(
    bug: str, changes: dict[str, Any], value: str, folder: Path, tmp_path: Path
) -> None:
    if not (folder / f"{bug}.pt").exists():
        planted.train(folder / f"{bug}.pt", bug)
    found = discover(config(folder, bug, tmp_path / "out", **changes), 0, planted.make)
    attribute = "" if changes else bug
    assert found["findings"][0]["slice"] == ["female", [[attribute, value]]]
    assert found["findings"][0]["wrong"] == "male" and found["images"] <= BUDGET


def test_a_classifier_without_the_bug_yields_nothing(folder: Path, tmp_path: Path) -> None:
    """The backgrounds were drawn at random, in training too, so that its failures have nothing to do with them."""
    for seed in range(4):
        given = config(folder, "clean", tmp_path / str(seed), attributes={"background": []}, images=600)
        found = discover(given, seed, planted.make)
        assert found["findings"] == [] and found["images"] <= 600
        assert max(rate["failures"] for rate in found["base"].values()) > 5, "it does fail"
    html = page(found)
    assert "none are findings" in html and "Failures that are alike" in html
    assert sum(cluster["failures"] for cluster in found["clusters"]) > 20 and html.count("taken for") >= 2


def test_findings_are_tested_again_on_images_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Other figures with the background show the bug; without one of them there is nothing to see."""
    others = planted.figures("test", 7)
    grey = {name: column[np.array(others["background"]) != "green"] for name, column in others.items()}
    planted.write(str(tmp_path / "others"), others)
    planted.write(str(tmp_path / "grey"), grey)
    again = {name: {"generator": {"images": str(tmp_path / name)}, "images": 60} for name in ("others", "grey")}
    given = config(folder, "background", tmp_path / "out", replications=again)
    found = discover(given, 0, planted.make)
    first = found["findings"][0]
    assert first["slice"] == ["female", [["background", "green"]]]
    told, nothing = (first["replications"][name] for name in again)
    assert told["replicated"] and told["rate"]["low"] > told["base_rate"]["high"]
    dataset = Dataset.open(str(tmp_path / "out" / "by-others"))
    cells = [Slice.from_json(cell) for cell, _ in dataset.header.provenance["slices"]]
    columns = Reader(dataset).gather(np.arange(dataset.header.num_samples))
    at = columns["slice"] == cells.index(Slice.from_json(first["slice"]))
    assert set(columns["background"][at]) == {"green"} and told["rate"]["images"] == at.sum()
    assert (columns["predicted_classifier"][at] != planted.LABELS.index("female")).sum() == told["rate"]["failures"]
    assert nothing["rate"]["images"] == 0 and nothing["q"] == 1 and nothing["replicated"] is None
    json.dumps(issues(found), allow_nan=False)
    html = page(found)
    assert "On images from elsewhere" in html and "not tested: no images" in html
    assert "- on images of others: " in issues(found)["issues"][0]["body"]
    assert found["images"] == drawn(tmp_path / "out") <= BUDGET


def test_looks_spare_images_and_end_with_the_same_finding(folder: Path, tmp_path: Path) -> None:
    found = discover(config(folder, "background", tmp_path / "out", looks=3), 0, planted.make)
    first = found["findings"][0]
    assert first["slice"] == ["female", [["background", "green"]]]
    stages = [name for name in found["stages"] if name.startswith("confirm")]
    asked = {
        name: [
            Slice.from_json(c) for c, _ in Dataset.open(found["stages"][name]["dataset"]).header.provenance["slices"]
        ]
        for name in stages
    }
    assert stages[0] == "confirm-1" and Slice.from_json(first["slice"]) in asked["confirm-1"]
    assert Slice.from_json(first["slice"]) not in asked[stages[-1]], "it was a finding before the last look"
    for test in [*found["findings"], *found["tested"]]:
        assert len(test["failures"]) == min(12, test["rate"]["failures"]), "of all looks"
    places = {uri: Dataset.open(uri) for test in found["tested"] for uri, _ in test["failures"]}
    assert len(places) > 1 and {dataset.header.provenance["stage"] for dataset in places.values()} <= set(stages)
    for test in found["tested"]:
        for uri, i in test["failures"]:
            sample = Reader(places[uri], ["slice", "label", "predicted_classifier"]).gather(np.array([i]))
            assert sample["predicted_classifier"][0] != sample["label"][0]
    assert found["images"] == drawn(tmp_path / "out") <= BUDGET


def test_false_findings_stay_under_the_level_over_several_looks(tmp_path: Path) -> None:
    """Slices that fail as often as their label, by chance alone, in many searches of four looks each."""
    level, searches, false, ended = 0.4, 60, 0, []
    slices = [Slice.of("a", [("style", value)]) for value in "pqrs"]
    for seed in range(searches):
        rng, stages = np.random.default_rng(seed), list[Results]()

        def run(  # type: ignore[no-untyped-def]
            name: str, wanted: list[tuple[Slice, int]], confirming: bool, rng=rng, seed=seed, stages=stages
        ) -> Results:
            of = [one for one, count in wanted for _ in range(count)]
            failed = rng.random(len(of)) < 0.3
            fields = {"label": Field("int")}
            dataset = Dataset.create(f"{tmp_path}/{seed}/{name}", Header(name, fields, len(of), len(of), ("a", "b")))
            answers, none = np.where(failed, "b", "a").astype(object), np.full(len(of), "", object)
            terms = [frozenset(one.terms) for one in of]
            stages.append(Results(dataset, of, {OWN: answers}, {OWN: failed}, terms, none, None, np.full(len(of), -1),
                                  np.full(len(of), 0.5), [(dataset.uri, i) for i in range(len(of))]))  # fmt: skip
            return stages[-1]

        model = {"generator": {"model": "-"}, "classifier": {"model": "-"}, "out": "-"}
        values = {**model, "images": 480, "looks": 4, "level": level, "least_ratio": 1.0}
        search = SimpleNamespace(
            config=configuration.from_dict(DiscoverConfig, values),
            bench=SimpleNamespace(labels={"a": "a"}), run=run, looked_at=0,
        )  # fmt: skip
        tests = confirmed(search, [Proposal(of, "b", 0.0) for of in slices])  # type: ignore[arg-type]
        false += any(test["finding"] for test in tests)
        ended.append(len(stages))
        assert sorted(test["name"] for test in tests) == [of.name for of in slices]
        for test in tests:
            on = [stage for stage in stages if any(of.name == test["name"] for of in stage.slices)]
            counted = sum(
                stage.failed[OWN][i] for stage in on for i, of in enumerate(stage.slices) if of.name == test["name"]
            )
            assert counted == test["rate"]["failures"] and (len(on) < len(stages)) <= test["finding"]
    assert false / searches <= level, "which four looks at the whole level would exceed"
    assert false > 0 and max(ended) == 4


def test_stopped_anywhere_it_ends_the_same(folder: Path, tmp_path: Path) -> None:
    whole = issues(discover(config(folder, "background", tmp_path / "whole"), 3, planted.make))

    def dies(dataset: Dataset, maker: str, values: dict[str, Any]) -> None:
        planted.make(dataset, maker, values, limit=3)
        if not dataset.complete:
            raise KeyboardInterrupt

    given, starts = config(folder, "background", tmp_path / "parts"), 0
    while True:
        starts += 1
        try:
            parts = issues(discover(given, 3, dies))
            break
        except KeyboardInterrupt:
            continue
    assert starts >= 4
    text = to_json(parts).replace(str(tmp_path / "parts").encode(), str(tmp_path / "whole").encode())
    assert text == to_json(whole)


def test_no_budget_is_exceeded(folder: Path, tmp_path: Path) -> None:
    for number, (images, find, rounds, slices) in enumerate([(7, 0.5, 2, 8), (150, 0.9, 3, 20), (301, 0.2, 1, 1)]):
        given = config(folder, "clean", tmp_path / str(number), images=images, find=find, rounds=rounds, slices=slices)
        found = discover(given, 0, planted.make)
        assert found["images"] == drawn(tmp_path / str(number)) <= images
        assert len(found["findings"] + found["tested"]) <= slices


def test_bad_input_is_said(folder: Path, tmp_path: Path) -> None:
    figures = str(folder / "figures")
    for changes, says in (
        ({"generator": {"images": str(tmp_path / "none")}}, "There is no dataset at"),
        ({"replications": {"b": {"generator": {"images": str(tmp_path / "none")}}}}, "There is no dataset at"),
        ({"attributes": {"mood": []}}, "has no field 'mood'"),
        ({"attributes": {"tone": ["pale"]}}, "has no image with tone=pale; it has dark"),
        ({"labels": {"child": ""}}, "The classifier 'classifier' has no class 'child'; it has female, male"),
        ({"labels": {"child": ""}, "accepted": {"child": ["male"]}}, "has no images of 'child'"),
        ({"classifier": {"model": str(tmp_path / "gone.pt")}}, "There is no classifier at"),
        ({"classifier": {"model": str(folder / "clean.pt")}}, "does not name its classes"),
        ({"generator": {"images": figures, "group": "family"}}, "has no field 'family'"),
        (
            {"generator": {"images": figures, "caption": "-"}, "words": True},
            "what draws the images has no captions",
        ),
    ):
        with pytest.raises(UserError, match=says):
            discover(config(folder, "clean", tmp_path / "out", **changes), 0, planted.make)
    assert not (tmp_path / "out").exists()
    for values, says in (
        ({"images": 0}, "discover.images must be positive"),
        ({"find": 1.0}, r"discover.find is a share in \(0, 1\)"),
        ({"generator": {}}, "needs one of model, pipeline and images"),
        ({"generator": {"pipeline": "p"}}, "size is"),
        ({"counterfactuals": 5}, "real images cannot be drawn again"),
        ({"replications": {"b": {"generator": {"images": figures}}}}, "replications.b is what the search draws from"),
        ({"replications": {"b": {"generator": {"images": "c"}, "images": 0}}}, "images must be positive"),
        ({"quota": 5, "scale_up": 4}, "so many failures are not among scale_up=4 images"),
        ({"quota": -1}, "discover.quota must not be negative"),
        ({"words": False, "attributes": {}}, "needs attributes, words=true, or both"),
    ):
        given = config(folder, "clean", tmp_path / "out", **values)
        problems = [
            *given.problems(),
            *given.generator.problems(),
            *(p for r in given.replications.values() for p in r.problems()),
        ]
        assert any(re.search(says, problem) for problem in problems), problems


class Brightness(nn.Module):
    """Probabilities of "dark" and "bright", by whether the mean of the pixels is above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = torch.sigmoid(400 * (images.mean((1, 2, 3)) - self.threshold))
        return torch.stack([1 - bright, bright], 1)


@pytest.mark.parametrize("per", ["finding", "label"])
def test_quotas_of_failures_are_exact_and_each_says_how_it_was_drawn(tmp_path: Path, per: str) -> None:
    """Stopped after every other shard: from what each image says of itself it can be drawn and classified again."""
    pipelines.write(tmp_path / "pipeline")
    generator = {"pipeline": str(tmp_path / "pipeline"), "size": [16, 16], "sampler": {"steps": 1, "guidance": 1.5}}
    draws = open_generator(configuration.from_dict(GeneratorConfig, generator), {"dark": "a thing"}, {}, 3, "cpu")
    slices = [Slice.of("dark", [("", "red")]), Slice.of("dark", [("", "round")])]
    some = draws.draw(Asked(slices * 20, np.arange(40), np.full(40, -1)))["image"]
    module = Brightness(float(np.median(some.mean((1, 2, 3)) / 255)))
    torch.jit.trace(module, torch.zeros(2, 3, 16, 16)).save(str(tmp_path / "brightness.pt"))
    values = {
        "generator": generator, "labels": {"dark": "a thing"}, "out": str(tmp_path / "out"), "words": False,
        "scale_up": 80, "quota": 9, "quota_per": per, "shard_size": 16, "batch": 16,
        "classifier": {"model": str(tmp_path / "brightness.pt"), "classes": ["dark", "bright"], "probabilities": True},
    }  # fmt: skip
    given = configuration.from_dict(DiscoverConfig, values)

    def dies(dataset: Dataset, maker: str, values: dict[str, Any]) -> None:
        planted.make(dataset, maker, values, limit=1)
        if not dataset.complete:
            raise KeyboardInterrupt

    starts = 0
    while True:
        starts += 1
        try:
            found = scaled_up(prepared(given, 3, dies), slices)
            break
        except KeyboardInterrupt:
            continue
    whole = dataclasses.replace(given, out=str(tmp_path / "whole"))
    parts, total = ({**f, "dataset": ""} for f in (found, scaled_up(prepared(whole, 3, planted.make), slices)))
    assert parts == total and starts >= 2

    names = [of.name for of in slices] if per == "finding" else ["dark"]
    assert found["quotas"].keys() == set(names) and found["failures"] == 9 * len(names) <= found["failed"]
    assert all(one["full"] and one["failures"] == 9 < one["images"] for one in found["quotas"].values())
    assert sum(one["images"] for one in found["quotas"].values()) == found["images"] <= 80
    failures = Dataset.open(found["dataset"])
    rows = Reader(failures, list(failures.header.fields)).gather(np.arange(found["failures"]))
    of = [Slice.from_json(failures.header.provenance["slices"][i]) for i in rows["slice"]]
    counts = [of.count(one) for one in slices]
    assert counts == [9, 9] if per == "finding" else max(counts) - min(counts) == 1, "the slices take turns"
    assert len(set(rows["number"])) == len(of) and set(rows["seed"]) == {3}
    again = draws.draw(Asked(of, rows["number"], np.full(len(of), -1)))
    assert np.array_equal(again["image"], rows["image"]) and list(again["prompt"]) == list(rows["prompt"])
    assert (again["image"].mean((1, 2, 3)) / 255 > module.threshold).all()
    assert set(rows["drawn_by"]) == {draws.said["pipeline_digest"]}
    assert set(rows["digest_classifier"]) == {failures.header.provenance["classifiers"]["classifier"]} != {""}


@pytest.mark.parametrize("seed", range(5))
def test_what_can_hardly_be_filled_takes_nothing_from_the_other_quotas(seed: int) -> None:
    """Four findings that fail always, often, hardly ever, and of which there are only six images."""
    slices = [Slice.of("a", [("style", value)]) for value in "pqr"] + [Slice.of("b", [("style", "p")])]
    rates, rng, done = (
        dict(zip(slices, (1.0, 0.4, 0.01, 1.0), strict=True)),
        np.random.default_rng(seed),
        list[Results](),
    )

    def run(name: str, wanted: list[tuple[Slice, int]], confirming: bool, once: bool) -> Results:
        there = {one: 6 - sum(stage.slices.count(one) for stage in done) for one in slices[3:]}
        of = [one for one, count in wanted for _ in range(min(count, there.get(one, count)))]
        failed = rng.random(len(of)) < [rates[one] for one in of]
        none = np.full(len(of), "", object)
        done.append(Results(SimpleNamespace(), of, {OWN: none}, {OWN: failed}, [], none, None, none, none, []))  # type: ignore[arg-type]
        return done[-1]

    def drawn(quota: int, budget: int, per: dict[str, list[Slice]]) -> dict[str, Rate]:
        done.clear()
        run("confirm", [(one, 40) for one in slices[:3]], True, True)
        search = SimpleNamespace(config=SimpleNamespace(quota=quota, scale_up=budget), run=run, done=done)
        stages = until_full(search, per)  # type: ignore[arg-type]
        assert sum(len(stage.slices) for stage in stages) <= budget and len(stages) < 20
        return {name: seen(stages, of) for name, of in per.items()}

    often, half, hardly, few = drawn(20, 500, {of.name: [of] for of in slices}).values()
    assert often.failures >= 20 and half.failures >= 20 > hardly.failures
    assert often.images < 40 and half.images < 110, "no more than they need"
    assert (few.failures, few.images) == (6, 6), "all there are"
    assert often.images + half.images + hardly.images + few.images == 500, "the rest is spent on what is not full"
    label, other = drawn(20, 500, {"a": slices[:3], "b": slices[3:]}).values()
    assert label.failures >= 20 and label.images < 100 and (other.failures, other.images) == (6, 6)
    one, *rest = drawn(1, 2, {of.name: [of] for of in slices}).values()
    assert one == Rate(1, 1) and sum(r.images for r in rest) == 1, "less budget than quotas"


def test_counterfactuals_are_the_same_images_without_a_term(tmp_path: Path) -> None:
    """Against images that are drawn one by one, and the sum of binomial probabilities."""
    pipelines.write(tmp_path / "pipeline")
    generator = {"pipeline": str(tmp_path / "pipeline"), "size": [16, 16], "sampler": {"steps": 1, "guidance": 1.5}}
    draws = open_generator(configuration.from_dict(GeneratorConfig, generator), {"dark": "a thing"}, {}, 0, "cpu")
    both = [Slice.of("dark", [("", "red"), ("", "round")]), Slice.of("dark", [("", "blue")])]
    slices = [both[0], Slice.of("dark", [("", "round")]), Slice.of("dark", [("", "red")]), both[1], Slice("dark")]
    count, nothing = 20, np.full(1, -1)
    means = [
        [draws.draw(Asked([of], np.array([i]), nothing))["image"].mean() / 255 for i in range(count)] for of in slices
    ]
    module = Brightness(float(np.median(means)))
    torch.jit.trace(module, torch.zeros(2, 3, 16, 16)).save(str(tmp_path / "brightness.pt"))
    values = {
        "generator": generator, "labels": {"dark": "a thing"}, "out": str(tmp_path / "out"), "words": False,
        "counterfactuals": count, "shard_size": 7, "batch": 3,
        "classifier": {"model": str(tmp_path / "brightness.pt"), "classes": ["dark", "bright"], "probabilities": True},
    }  # fmt: skip
    search = prepared(configuration.from_dict(DiscoverConfig, values), 0, planted.make)
    findings: list[dict[str, Any]] = [{"slice": of.to_json()} for of in both]
    counterfactuals(search, findings)
    failed = {of: np.array(row) > module.threshold for of, row in zip(slices, means, strict=True)}
    assert [[pair["term"] for pair in f["counterfactuals"]] for f in findings] == [["'red'", "'round'"], ["'blue'"]]
    images = Reader(Dataset.open(str(tmp_path / "out" / "pairs"))).gather(np.arange(len(slices) * count))["image"]
    for own, without, pair in [
        (both[0], slices[1], findings[0]["counterfactuals"][0]),
        (both[0], slices[2], findings[0]["counterfactuals"][1]),
        (both[1], slices[4], findings[1]["counterfactuals"][0]),
    ]:
        only, back = int((failed[own] & ~failed[without]).sum()), int((failed[without] & ~failed[own]).sum())
        assert (pair["only_with"], pair["only_without"]) == (only, back)
        assert (pair["rate"]["failures"], pair["rate_without"]["failures"]) == (
            failed[own].sum(),
            failed[without].sum(),
        )
        tail = sum(comb(only + back, k) for k in range(only, only + back + 1)) / 2 ** (only + back)
        assert pair["p"] == pytest.approx(tail)
        for first, second in pair["pairs"]:
            i = first % count
            assert second % count == i and failed[own][i] and not failed[without][i]
            assert images[first].mean() / 255 == pytest.approx(means[slices.index(own)][i])
            assert images[second].mean() / 255 == pytest.approx(means[slices.index(without)][i])
    assert any(pair["pairs"] for f in findings for pair in f["counterfactuals"]), "none differs; the test says nothing"

    # With a rule that half of some slice break, others are drawn in their place, and pairs are of those that stayed.
    contrast = scorer(RuleConfig(Scorer.contrast, at_most=0.0))
    own, without = both[1], slices[4]
    before = np.concatenate([images[slices.index(of) * count :][:count] for of in (own, without)])
    bound = float(np.median(contrast({"image": before}).reshape(2, count), 1).max())
    rules = {"loud": {"scorer": "contrast", "at_most": bound}}
    values |= {"out": str(tmp_path / "safe"), "safety": {"rules": rules, "tries": 64}}
    counterfactuals(prepared(configuration.from_dict(DiscoverConfig, values), 0, planted.make), findings[1:])
    safe = Dataset.open(str(tmp_path / "safe" / "pairs"))
    after = Reader(safe).gather(np.arange(2 * count))
    passed = contrast({"image": before}) <= bound
    assert contrast({"image": after["image"]}).max() <= bound and safe.header.provenance["safety"]["rules"]["loud"]
    assert np.array_equal([np.array_equal(a, b) for a, b in zip(after["image"], before, strict=True)], passed)
    assert np.array_equal(after["tries"] == 1, passed)
    kept, (pair,) = passed[:count] & passed[count:], findings[1]["counterfactuals"]
    assert 0 < kept.sum() == pair["rate"]["images"] == pair["rate_without"]["images"] < count
    assert pair["only_with"] == int((failed[own] & ~failed[without] & kept).sum())
    assert withheld(safe) == {"images": (after["tries"] - 1).sum(), "reasons": {}}
    values |= {"out": str(tmp_path / "never"), "safety": {"rules": {"all": {"scorer": "contrast", "at_least": 999.0}}}}
    with pytest.raises(
        UserError, match=r"Of .* none of 16 images passed discover\.safety\.rules \(all\); leave it out"
    ):
        counterfactuals(prepared(configuration.from_dict(DiscoverConfig, values), 0, planted.make), findings[1:])


def test_open_ended_with_a_pipeline_and_retrieved_captions(tmp_path: Path) -> None:
    """A random network, of whose images half are bright: they are described by captions, and asked for in words of those."""
    pipelines.write(tmp_path / "pipeline")
    known = planted.write(
        str(tmp_path / "known"), {n: column[:40] for n, column in planted.figures("test").items()}, 20
    )
    generator = {"pipeline": str(tmp_path / "pipeline"), "size": [16, 16], "sampler": {"steps": 1, "guidance": 1.5}}
    values = {
        "generator": generator, "labels": {"dark": "a dark thing"}, "captions": {"images": known.uri},
        "embedder": {"size": 32}, "images": 120, "longest": 1, "out": str(tmp_path / "out"),
    }  # fmt: skip
    draws = open_generator(configuration.from_dict(GeneratorConfig, generator), {"dark": "a dark thing"}, {}, 0, "cpu")
    drawn = draws.draw(Asked([Slice("dark")] * 30, np.arange(30), np.full(30, -1)))["image"]
    module = Brightness(float(np.median(drawn.mean((1, 2, 3)) / 255)))
    torch.jit.trace(module, torch.zeros(2, 3, 16, 16)).save(str(tmp_path / "brightness.pt"))
    classifier = {"model": str(tmp_path / "brightness.pt"), "classes": ["dark", "bright"], "probabilities": True}
    found = discover(configuration.from_dict(DiscoverConfig, {**values, "classifier": classifier}), 0, planted.make)
    assert found["images"] <= 120 and 0.2 < found["base"]["dark"]["rate"] < 0.8
    first = Reader(Dataset.open(str(tmp_path / "out" / "look-1"))).gather(np.arange(30))
    assert np.array_equal(first["image"], drawn), "an image is a function of its number"
    captions = set(Reader(known, ["caption"]).gather(np.arange(40))["caption"])
    assert set(first["shows"]) <= captions and set(first["prompt"]) == {"a dark thing"}
    second = Dataset.open(str(tmp_path / "out" / ("closer-2" if "closer-2" in found["stages"] else "look-2")))
    asked = [Slice.from_json(cell) for cell, _ in second.header.provenance["slices"]]
    prompts = set(Reader(second, ["prompt"]).gather(np.arange(second.header.num_samples))["prompt"])
    assert prompts == {", ".join(["a dark thing", *of.phrases]) for of in asked}


def test_where_all_others_see_the_same_wrong_class_the_picture_is_doubted() -> None:
    """Of ten images of a slice the classifier gets six wrong, and on two of them both others say the very same."""
    wrong = np.array(["dog"] * 6 + ["cat"] * 14)
    elder = np.array(["dog", "dog", "dog", "cat", "cat", "cat"] + ["cat"] * 14)
    other = np.array(["dog", "dog", "cow", "cow", "cat", "cat"] + ["cat"] * 14)
    answers = {OWN: wrong, "elder": elder, "other": other}
    failed = {name: said != "cat" for name, said in answers.items()}
    place = [("there", i) for i in range(20)]
    on = Results(
        None, [Slice("cat")] * 20, answers, failed, [frozenset()] * 20, np.full(20, "", object), None, np.full(20, -1),
        np.ones(20, np.float32), place,
    )  # fmt: skip
    search = SimpleNamespace(
        config=SimpleNamespace(others=["elder", "other"]), bench=SimpleNamespace(labels={"cat": ""})
    )
    own, base = np.arange(10), np.arange(10, 20)
    rates = [Rate(6, 10), Rate(0, 10)]
    found = loop._row(search, Proposal(Slice("cat"), "dog", 0.01), on, own, base, rates, rates)
    assert (found["label_doubted"]["failures"], found["label_doubted"]["images"]) == (2, 6)
    assert (found["rate_undoubted"]["failures"], found["rate_undoubted"]["images"]) == (4, 8)
    assert found["rate"]["rate"] == 0.6 and found["rate_undoubted"]["rate"] == 0.5
    assert found["others"]["elder"]["slice"]["failures"] == 3 and found["others"]["other"]["base"]["failures"] == 0
