"""Attacks and soups as jobs on a Ray of their own, and what the report says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rayproj import classifiers
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.report.build import build
from rayproj.robustness.job import share
from tests.robustness.test_job import write
from tests.robustness.test_mixing import train
from tests.support.commands import job
from tests.support.ranks import run_ranks

QUICK = ["pool.actors=2", "pool.cpus_per_actor=0.5"]
THREATS = "{linf: {norm: linf, eps: 0.08}, l1: {norm: l1, eps: 2}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write(f"{path}/train", slice(0, 900))
    write(f"{path}/test", slice(900, 1000))
    run_ranks(train, 1, str(path))
    return path


def test_evaluate_attacks_classifiers_and_defences_and_the_report_shows_it(folder: Path) -> None:
    given = [
        f"robustness.test={folder}/test", f"robustness.out={folder}/attacked", f"robustness.threats={THREATS}",
        f"robustness.classifiers={{base: {folder}/base, linf: {folder}/linf}}",
        "robustness.defences={anti: {base: linf, kind: anti_adversary, options: {steps: 2}}}",
        "robustness.attack={attacks: [apgd_ce, apgd_t, fab_t, square], steps: 10, targets: 2, queries: 20}",
        "robustness.adaptive={steps: 5, queries: 20, radii: [1], defence_steps: [1]}", "robustness.examples=24",
        "robustness.shard_size=12", f"run.dir={folder}/evaluate",
    ]  # fmt: skip
    done = job("evaluate", "configs/evaluate/robustness.yaml", *given, *QUICK)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "evaluate" / "result.json").read_text())["robustness"]
    assert set(found) == {"base", "linf", "anti"} and found["anti"]["cost"]["passes"] == [4, 2]
    robust = {name: found[name]["threats"]["linf"]["robust"]["value"] for name in found}
    assert robust["linf"] > robust["base"], "it was trained for that"
    assert found["base"]["masking"] and "masking" not in found["anti"]
    other, samples = classifiers.load(f"{folder}/linf", "cpu"), Reader(Dataset.open(f"{folder}/attacked/base"))
    clean = Reader(Dataset.open(f"{folder}/test"), ["image"])
    held = []
    for i in range(24):
        one = {name: values[0] for name, values in samples.gather(np.array([i])).items()}
        images = torch.tensor(one["linf_image"][None]), torch.from_numpy(clean.gather(np.array([i]))["image"]) / 255
        after, before = (int(other(255 * image).argmax()) == one["label"] for image in images)
        if before and one["linf_by"] not in ("", "clean"):
            held.append(after)
    assert found["base"]["threats"]["linf"]["transfer"] == {"linf": share(np.array(held))} and 0 < len(held) < 24
    report, html = build(str(folder), {"evaluate": str(folder / "evaluate")})
    assert report["robustness"] == found
    assert html.count("It costs less than ten times its base") == 2, "a checklist of each threat"
    for text in (
        "Do images that break one classifier break another?",
        "somebody wants it to be wrong",
        "anti: a defence at test time",
        "4 passes through the base forward and 2 back",
        "signs that gradients only seem to lead nowhere",
    ):
        assert text in html
    for picture in (
        "Accuracy under attack over the radius",
        "the magnified difference",
        "over their cost",
        "by queries and by their own steps",
    ):
        assert picture in html


def test_killed_in_the_middle_it_attacks_the_rest_and_ends_the_same(folder: Path) -> None:
    def given(name: str) -> list[str]:
        return [
            f"robustness.test={folder}/test", f"robustness.out={folder}/{name}_attacked", "robustness.defences={}",
            "robustness.threats={linf: {norm: linf, eps: 0.08}}", f"robustness.classifiers={{base: {folder}/base}}",
            "robustness.attack={attacks: [apgd_ce, square], steps: 5, queries: 10}", "robustness.examples=24",
            "robustness.shard_size=6", f"run.dir={folder}/{name}",
        ]  # fmt: skip

    config, found = "configs/evaluate/robustness.yaml", []
    killed = job("evaluate", config, *given("killed"), *QUICK, RAYPROJ_FAULT="lease.after_finish:*:2")
    assert killed.returncode == -9, killed.stderr
    before = Dataset.open(f"{folder}/killed_attacked/base").records()
    assert 0 < len(before) < 4
    for name in ("killed", "whole"):
        alone = ["pool.actors=1"] if name == "whole" else []  # what is found does not depend on how many attack
        done = job("evaluate", config, *given(name), *QUICK, *alone)
        assert done.returncode == 0, done.stderr
        dataset = Dataset.open(f"{folder}/{name}_attacked/base")
        result = json.loads((folder / name / "result.json").read_text())
        checks = Dataset.open(f"{folder}/{name}/checks")
        found.append((result["robustness"], [r.sha256 for d in (dataset, checks) for r in d.records().values()]))
    assert found[0] == found[1]


def test_soups_of_members_and_of_the_branches_of_one(folder: Path) -> None:
    given = [
        f"soup.members={{linf: {folder}/linf, l2: {folder}/l2}}", f"soup.test={folder}/test", f"soup.out={folder}/soups",
        f"soup.shifts={{train: {folder}/train}}", "soup.corruptions=[contrast]",
        "soup.threats={linf: {norm: linf, eps: 0.08}}", "soup.parts=4",
        "soup.steps=5", "soup.examples=40", "soup.shots=[10]", "soup.learn={how: [affine], shots: 20, steps: 3}",
        f"run.dir={folder}/soup",
    ]  # fmt: skip
    done = job("soup", "configs/soup.yaml", *given, *QUICK)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "soup" / "result.json").read_text())
    assert found["members"] == ["l2", "linf"] and len(found["soups"]) == 5
    assert (
        np.allclose([sum(one["weights"]) for one in found["soups"]], 1) and "10" in found["few_shot"]["train"]["chosen"]
    )
    assert found["few_shot"].keys() == {"train", "contrast"} and found["learned"]["affine"]["linf"]["n"] == 40
    told = [given[0].replace(f"linf: {folder}/linf, l2: {folder}/l2", f"both: {folder}/both"), *given[1:2]]
    rest = [f"soup.out={folder}/tokens", "soup.threats={}", "soup.parts=2", "soup.examples=20"]
    rest += [f"run.dir={folder}/tokens-run"]
    assert job("soup", "configs/soup.yaml", *told, *rest, *QUICK).returncode == 0
    assert json.loads((folder / "tokens-run" / "result.json").read_text())["members"] == [
        "both:clean",
        "both:adversarial",
    ]


def test_nothing_to_evaluate_is_said(tmp_path: Path) -> None:
    done = job("evaluate", "configs/evaluate/robustness.yaml", "robustness.classifiers={}", "robustness.defences={}")
    assert done.returncode == 2 and "There is nothing to evaluate" in done.stderr
