"""The evaluation of epistemic networks under shift: several ranks find what one finds, and the page shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rayproj.jobs.evaluate_shift import Config  # type: ignore[attr-defined]
from rayproj.jobs.train_classifier import Config as TrainConfig  # type: ignore[attr-defined]
from rayproj.jobs.train_classifier import worker
from sklearn.metrics import roc_auc_score

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.corruptions import corrupted
from rayproj.evaluation.shift import ShiftConfig, conditions, evaluate, hard_conditions, load
from rayproj.keyed import places
from rayproj.obfuscation.assets import Assets, AssetsConfig
from rayproj.obfuscation.registry import obfuscate
from rayproj.report.shift import grouped, loss_over_severity, page
from rayproj.storage.store import Store, from_json, to_json
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

CLASSES = ("zero", "one", "two", "three")


def write_bars(uri: str, seed: int, labels: list[int], size: int = 120, light: int = 110) -> None:
    """Class = which quarter of the image is brighter."""
    fields = {"image": Field("png", (1, 16, 16)), "label": Field("int")}
    dataset, rng = Dataset.create(uri, Header("bars", fields, size, 40, CLASSES)), np.random.default_rng(seed)
    for shard in range(dataset.header.num_shards):
        samples = []
        for i in dataset.header.shard_range(shard):
            label = labels[i % len(labels)]
            image = rng.integers(0, 100, (1, 16, 16))
            image[:, 4 * label : 4 * label + 4] += light
            samples.append({"key": f"{i:08d}", "image": image.astype(np.uint8), "label": label})
        commit_shard(dataset, shard, samples, "test", 0.0)


NETWORKS: dict[str, dict[str, Any]] = {
    "base": {},
    "epinet": {"start": "base", "trainable": "^epinet", "epistemic": {"kind": "epinet", "index": 6}},
    "ensemble": {"epistemic": {"kind": "ensemble", "members": 3, "prior": 0.0}},
}


REFERENCES: dict[str, dict[str, Any]] = {"weak": {"steps": 2, "seed": 1}, "weaker": {"steps": 1, "seed": 2}}


def train(world: World, folder: str) -> None:
    for name, arm in (NETWORKS | REFERENCES).items():
        values = {
            "data": f"{folder}/train",
            "start": {"run": f"{folder}/{arm['start']}" if "start" in arm else ""},
            "trainable": arm.get("trainable", ""),
            "augment": {"shift": 0, "flip": False},
            "classifier": {"channels": [8, 16], "dropout": 0.0, "epistemic": arm.get("epistemic", {})},
            "train": {"steps": arm.get("steps", 40), "batch": 30, "engine": {"ema": 0.5, "optimizer": {"lr": 5e-3}}},
            "run": {"dir": f"{folder}/{name}", "seed": arm.get("seed", 0)},
        }
        config = configuration.from_dict(TrainConfig, values)
        Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
        worker(configuration.to_dict(config), world, Recorder("a"))


def config(folder: str) -> ShiftConfig:
    return ShiftConfig(
        networks={name: f"{folder}/{name}" for name in NETWORKS},
        test=f"{folder}/test",
        validation=f"{folder}/validation",
        shifted={"darker": f"{folder}/darker"},
        hard={"weak": [f"{folder}/weak"], "both": [f"{folder}/weak", f"{folder}/weaker"]},
        unknown={"fourth": f"{folder}/fourth"},
        corruptions=["gaussian_noise", "impulse_noise"],
        severities=[1, 5],
        indices=[1, 2, 10],
        most={"epinet": 25},
        obfuscations=["SwirlWarp", "LineShift"],
        extrapolated=[30],
        tau=5,
        samples=100,
        batch=32,
    )


def evaluate_on(world: World, folder: str) -> dict[str, Any]:
    with pytest.raises(UserError) as refused:
        hard_conditions(replace(config(folder), tau=121), world)
    return {"refused": str(refused.value), **evaluate(config(folder), world, Recorder("b"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shift")
    for name, seed, labels, light in [
        ("train", 0, [0, 1, 2], 110), ("validation", 1, [0, 1, 2], 110), ("test", 2, [0, 1, 2], 110),
        ("darker", 3, [0, 1, 2], 5), ("fourth", 4, [3], 110),
    ]:  # fmt: skip
        write_bars(f"{path}/{name}", seed, labels, light=light)
    run_ranks(train, 1, str(path))
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_ranks(evaluate_on, 1, str(folder))[0]  # type: ignore[no-any-return]


def test_obfuscations_of_several_severities_are_conditions_each(folder: Path) -> None:
    given = replace(config(str(folder)), corruptions=[], obfuscations=["LineShift"], obfuscation_severities=[1, 5])
    found = {c.name: c for c in conditions(given) if c.family == "obfuscated"}
    assert {name: c.severity for name, c in found.items()} == {"LineShift 1": 1, "LineShift 5": 5}
    images = torch.from_numpy(Reader(Dataset.open(f"{folder}/test")).gather(np.arange(20))["image"])
    expected = obfuscate("LineShift", images, places(20), 0, Assets.load(AssetsConfig()), 5)[0]
    assert torch.equal(found["LineShift 5"].change(images, places(20)), expected)
    assert not torch.equal(found["LineShift 1"].change(images, places(20)), expected)
    assert replace(given, obfuscation_severities=[0]).problems() == ["shift.obfuscation_severities lie in 1 to 5."]


def test_other_classes_are_refused_and_not_taken_by_their_numbers(folder: Path) -> None:
    odd = Dataset.create(f"{folder}/odd", replace(Dataset.open(f"{folder}/test").header, classes=CLASSES[::-1]))
    given = replace(config(str(folder)), shifted={"odd": odd.uri})
    with pytest.raises(UserError, match=r"shift.shifted.odd are not those of shift.test.*zero, one"):
        evaluate(given, World(0, 1, 0, "cpu"), Recorder("b"))


def test_ranks_share_the_work(folder: Path, found: dict[str, Any]) -> None:
    shared = run_ranks(evaluate_on, 2, str(folder))
    for other in shared:
        assert other["conditions"] == found["conditions"]
        for name, counts in found["measures"].items():
            for count, by in counts.items():
                for condition, values in by.items():
                    theirs = other["measures"][name][count][condition]
                    assert theirs == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), (name, count, condition)
    assert shared[0]["costs"] and shared[1]["costs"] is None


def test_what_is_found(folder: Path, found: dict[str, Any]) -> None:
    assert {name: list(by) for name, by in found["measures"].items()} == {
        "base": ["1"], "epinet": ["1", "2", "10", "25"], "ensemble": ["1", "2", "3"],
    }  # fmt: skip
    names = ["test", "darker", *(f"{c} {s}" for c in ("gaussian_noise", "impulse_noise") for s in (1, 5))]
    names += ["LineShift", "SwirlWarp", "hard for weak", "hard for both"]
    assert [c["name"] for c in found["conditions"]] == names and found["conditions"][0]["n"] == 100
    accuracy = {name: by["accuracy"] for name, by in found["measures"]["base"]["1"].items()}
    assert accuracy["test"] > 0.95 and accuracy["darker"] < accuracy["test"]
    base = found["measures"]["base"]["1"]["darker"]
    assert base["dyadic_nll_exact"] == pytest.approx(base["dyadic_nll_independent"]) and base["doubt_epistemic"] == 0
    for name in ("epinet", "ensemble"):
        one = found["measures"][name][max(found["measures"][name], key=int)]["darker"]
        assert one["dyadic_nll_exact"] != pytest.approx(one["dyadic_nll_independent"]) and one["doubt_epistemic"] > 0
    # By hand: the corrupted images of the test set, keyed by their numbers, at the fitted temperature.
    images = torch.from_numpy(Reader(Dataset.open(f"{folder}/test")).gather(np.arange(100))["image"])
    changed, network = corrupted(images, places(100), "gaussian_noise", 5), load(f"{folder}/epinet", "cpu")
    with torch.no_grad():
        logits = network(changed, network.indices(25)) / found["temperatures"]["epinet"]["25"]
    right = logits.softmax(2).mean(0).argmax(1) == torch.arange(100) % 3
    expected = found["measures"]["epinet"]["25"]["gaussian_noise 5"]["accuracy"]
    assert right.float().mean().item() == pytest.approx(expected)
    hidden = obfuscate("SwirlWarp", images, places(100), 0, Assets.load(AssetsConfig()))[0]
    with torch.no_grad():
        base_network = load(f"{folder}/base", "cpu")
        right = base_network(hidden, base_network.indices(1))[0].argmax(1) == torch.arange(100) % 3
    assert right.float().mean().item() == pytest.approx(found["measures"]["base"]["1"]["SwirlWarp"]["accuracy"])
    errors = found["corruption_errors"]["networks"]
    by = [found["measures"]["epinet"]["25"][name]["accuracy"] for name in names[2:6]]
    assert errors["epinet"]["25"]["mean_corruption_error"] == pytest.approx(1 - np.mean(by))
    own = [found["measures"]["base"]["1"][name]["accuracy"] for name in names[2:6]]
    errs = all(np.mean(own[k : k + 2]) < 1 for k in (0, 2))  # under each corruption, without which there is no ratio
    assert errors["base"]["1"]["mce_normalised"] == pytest.approx(1 if errs else np.nan, nan_ok=True)
    assert set(found["unknown"]["ensemble"]["3"]["fourth"]) == {
        "confidence", "margin", "total", "aleatoric", "epistemic", "variation",
    }  # fmt: skip
    assert found["unknown"]["ensemble"]["3"]["fourth"]["total"]["auroc"] > 0.5


def test_hard_images_are_what_all_references_get_wrong(folder: Path, found: dict[str, Any]) -> None:
    batch = Reader(Dataset.open(f"{folder}/test")).gather(np.arange(120))
    images, labels = torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"])
    with torch.no_grad():
        wrong = [load(f"{folder}/{name}", "cpu")(images).argmax(1) != labels for name in REFERENCES]
        network = load(f"{folder}/ensemble", "cpu")
        p = (network(images, network.indices(3)) / found["temperatures"]["ensemble"]["3"]).softmax(2).mean(0)
    right, n = p.argmax(1) == labels, {c["name"]: c["n"] for c in found["conditions"]}
    for name, chosen in (("weak", wrong[0]), ("both", wrong[0] & wrong[1])):
        assert n[f"hard for {name}"] == min(100, chosen.sum()) and 5 <= chosen.sum() < 120
        ids = chosen.nonzero()[:100, 0]  # of all test images, not of the first hundred alone
        by = found["measures"]["ensemble"]["3"][f"hard for {name}"]
        assert by["accuracy"] == pytest.approx(right[ids].float().mean().item())
        if 0 < right[ids].sum() < len(ids):
            expected = roc_auc_score(~right[ids].numpy(), 1 - p[ids].max(1)[0].numpy())
            assert by["error_auroc"] == pytest.approx(expected, abs=1e-6)
        else:
            assert "error_auroc" not in by
    by = found["measures"]["base"]["1"]["darker"]
    assert 0 < by["accuracy"] < 1 and 0 <= by["error_auroc"] <= 1
    assert found["hard"]["hard for both"] == {
        "references": [f"{folder}/weak", f"{folder}/weaker"], "n": min(100, int((wrong[0] & wrong[1]).sum()))
    }  # fmt: skip


def test_what_is_judged_chooses_no_hard_images(folder: Path) -> None:
    given = replace(config(str(folder)), hard={"own": [f"{folder}/base"]})
    assert "'" + f"{folder}/base' is judged itself" in given.problems()[0]
    given = replace(given, networks={"epinet": f"{folder}/epinet"})
    assert not given.problems()
    with pytest.raises(UserError, match=r"shift.hard.own: .*base' is judged itself, or began a run that is"):
        hard_conditions(given, World(0, 1, 0, "cpu"))
    given = replace(given, networks={"base": f"{folder}/base"}, hard={"own": [f"{folder}/base/"]})
    assert f"{folder}/base/' is judged itself" in given.problems()[0], "however it is written"
    assert replace(given, hard={"none": []}).problems() == ["shift.hard.none names no run."]


def test_too_few_hard_images_are_said(found: dict[str, Any]) -> None:
    said = found["refused"]
    assert "of 120 test images the references get" in said and "121 are needed; give weaker or fewer references" in said


def test_costs(found: dict[str, Any]) -> None:
    cost = {(row["network"], row["indices"]): row for row in found["costs"]}
    assert cost["ensemble", 30]["extrapolated"] and not cost["ensemble", 3]["extrapolated"]
    for key in ("parameters", "training_flops"):
        assert cost["ensemble", 30][key] == pytest.approx(10 * cost["ensemble", 3][key])
        assert cost["ensemble", 3][key] == pytest.approx(3 * cost["base", 1][key], rel=0.01)
    # An epinet on a base costs that base's training too.
    assert cost["epinet", 25]["training_flops"] > cost["base", 1]["training_flops"]
    assert cost["epinet", 25]["trained"] < cost["epinet", 25]["parameters"] - cost["base", 1]["parameters"]


def test_the_page_has_it_all(found: dict[str, Any]) -> None:
    result = from_json(to_json(found))  # as it comes from a store
    html = page(result)
    order = [html.index(f"<td>epinet</td><td>{count}</td>") for count in (1, 2, 10, 25)]
    assert order == sorted(order)
    assert grouped(result) == {
        "in distribution": ["test"], "darker": ["darker"],
        "corrupted": ["gaussian_noise 1", "gaussian_noise 5", "impulse_noise 1", "impulse_noise 5"],
        "obfuscated": ["LineShift", "SwirlWarp"],
        "hard for weak": ["hard for weak"], "hard for both": ["hard for both"],
    }  # fmt: skip
    for text in (
        *NETWORKS,
        "fourth",
        "In distribution",
        "Corrupted",
        "mCE, normalised",
        "ensemble *",
        "data:image/svg",
        "weak and ",
        "hard by choice",
    ):
        assert text in html
    shown = found["measures"]["epinet"]["25"]["test"]["dyadic_nll_exact"]
    assert f"{shown:.3f}" in html
    line = next(line for line in loss_over_severity(result).axes[0].lines if line.get_label() == "epinet")
    by = result["measures"]["epinet"]["25"]
    corrupted_5 = [by[f"{name}_noise 5"]["dyadic_nll_exact"] for name in ("gaussian", "impulse")]
    assert list(line.get_xdata()) == [0, 1, 5], "obfuscated images have no severity"
    assert line.get_ydata()[0] == pytest.approx(shown) and line.get_ydata()[2] == pytest.approx(np.mean(corrupted_5))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"networks": {}}, "names no run"),
        ({"corruptions": ["fgo"]}, "shift.corruptions has 'fgo'"),
        ({"severities": [0]}, "lie in 1 to 5"),
        ({"obfuscations": ["Fog"]}, "There is no obfuscation 'Fog'"),
        ({"baseline": "b"}, "is not in shift.networks"),
        ({"tau": 0}, "shift.tau must be positive"),
        ({"indices": []}, "must be positive numbers"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    values = {"shift": {"networks": {"a": "x"}, "test": "t", **wrong}, "run": {"dir": "y"}}
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said):
        configuration.load(Config, tmp_path / "c.yaml")
