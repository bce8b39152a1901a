"""The report of a fairness study from folders as a sweep leaves them: planted differences are found, controls can fail."""

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from rayproj.classifiers.augment import AugmentConfig
from rayproj.classifiers.model import ClassifierConfig
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Dataset
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.engine.steps import PlainStep
from rayproj.engine.training import Recipe, TrainConfig, train
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.report.study import ControlsConfig, StudyConfig, _left_out, build, gather
from rayproj.storage.store import Store, to_json
from tests.support import images, regression
from tests.support.ranks import run_ranks

N, SEEDS = 240, 3
RATES = {  # arm, axis, value: how often it is right on the groups dark and light
    ("base", "", ""): (0.5, 0.9),
    ("fair", "", ""): (0.9, 0.9),
    ("idle", "", ""): (0.5, 0.9),
    ("fair", "alpha", "0"): (0.5, 0.9),
    ("fair", "alpha", "0.75"): (0.8, 0.8),
}


def train_two(world: World, root: str) -> None:
    """Classifiers of a few steps, of two seeds."""
    data = Dataset.open(f"{root}/images")
    for seed in range(2):
        task = ClassificationTask(ClassifierConfig(channels=(8,)), data.header, seed, AugmentConfig(0, False))
        batches = Batches(Reader(data, ["image", "label"]), Shuffled(48, 16, 8, seed), 0, 1)
        run = Store(f"{root}/trained-{seed}")
        run.put_once("config.yaml", b"{}")
        recipe = Recipe(task, PlainStep(8, 0, 1), batches, TrainConfig(steps=2, batch=8))
        train(recipe, world, run, regression.Recorder("a"))


def predictions(setting: tuple[str, str, str], seed: int) -> bytes:
    """Of two test sets; base and idle are right alike under a seed but for a tenth of the images."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng([seed, *setting[0].encode()])
    tables = []
    for test in ("test", "out"):
        dark = np.arange(N) % 2 == 0
        draw = np.where(noise.random(N) < 0.1, noise.random(N), rng.random(N))
        right = draw < np.where(dark, *RATES[setting])
        label = np.arange(N) % 3
        said, names = {"label": label, "prediction": np.where(right, label, (label + 1) % 3)}, np.array(["a", "b", "c"])
        probabilities = 0.1 * noise.random((N, 3)) + 0.6 * np.eye(3)[said["prediction"]]
        said = {name: names[column] for name, column in said.items()}
        said["probabilities"] = list(probabilities / probabilities.sum(1, keepdims=True))
        tables.append(pa.table({"test": [test] * N, **said, "tone": np.where(dark, "dark", "light")}))
    sink = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    root = tmp_path_factory.mktemp("study")
    images.write(f"{root}/images", 48)
    images.write(f"{root}/test", N)
    run_ranks(train_two, 1, str(root))
    rows = []
    for setting in RATES:
        for seed in range(SEEDS):
            arm, axis, value = setting
            name = f"{arm}{axis}{value}-{seed}"
            folder = root / name
            Store(str(folder / "evaluate")).write("predictions.parquet", predictions(setting, seed))
            shutil.copytree(root / f"trained-{seed % 2}", folder / "train")
            rows.append({
                "point": name, "grids": ["g"], "axes": {"arm": arm, "seed": str(seed), **({axis: value} if axis else {})},
                "runs": {stage: str(folder / stage) for stage in ("train", "evaluate")},
                "results": {"train": {"job": "train_classifier"}, "evaluate": {"job": "evaluate"}},
            })  # fmt: skip
    Store(f"{root}/sweep").write("table.json", to_json(rows))
    cells = {"a × dark": {"samples": 40, "kept": 10}, "a × light": {"samples": 40, "kept": 30}}
    curated = {"samples": 80, "kept": 40, "reasons": {"unsure": 40}, "cells": cells}
    Store(f"{root}/curated").write("result.json", to_json(curated))
    return StudyConfig(
        root=str(root), sweep=f"{root}/sweep", baseline="base", groups=["tone"], cluster_by="note",
        tests={"here": f"{root}/test", "out": f"{root}/test"}, kinds={"synthetic": ["fair"]}, usual={"alpha": "0.5"},
        controls=ControlsConfig({"fair": "base", "idle": "base"}, {"alpha=0": "base"}),
        filters={"fair": f"{root}/curated"}, shown={"real": f"{root}/images"}, bootstraps=200,
    )  # fmt: skip


def test_small_and_unknown_groups_are_left_out(study: StudyConfig) -> None:
    assert _left_out(["b"] * 10 + ["a"] * 9 + [""] * 20, 10) == {"": 20, "a": 9}
    some = gather(replace(study, group_examples=N // 2))["tests"]["here"]
    assert some["left_out"] == {} and some["images"] == N
    with pytest.raises(UserError, match="'here' has no group with"):
        gather(replace(study, group_examples=N // 2 + 1))


def naive(setting: tuple[str, str, str], number: int) -> tuple[list[float], list[float]]:
    """Accuracies and gaps of the seeds on a test set, by loops."""
    accuracies, gaps = [], []
    for seed in range(SEEDS):
        table = parquet.read_table(io.BytesIO(predictions(setting, seed))).to_pylist()[number * N : (number + 1) * N]
        right = [row["label"] == row["prediction"] for row in table]
        by: dict[str, list[bool]] = {"dark": [], "light": []}
        for row, one in zip(table, right, strict=True):
            by[row["tone"]].append(one)
        accuracies.append(sum(right) / N)
        gaps.append(abs(sum(by["dark"]) - sum(by["light"])) / (N / 2))
    return accuracies, gaps


def theirs(setting: tuple[str, str, str], seed: int, number: int) -> tuple[float, float]:
    """Balanced accuracy and AUC by another library."""
    metrics = pytest.importorskip("sklearn.metrics")
    table = parquet.read_table(io.BytesIO(predictions(setting, seed))).to_pandas()[number * N : (number + 1) * N]
    auc = metrics.roc_auc_score(table["label"], np.stack(list(table["probabilities"])), multi_class="ovr")
    return metrics.balanced_accuracy_score(table["label"], table["prediction"]), auc


def test_every_number_of_the_table_and_what_is_said_of_it(study: StudyConfig) -> None:
    found, html, picture = build(study)
    for number, test in enumerate(("here", "out")):
        for arm in ("base", "fair", "idle"):
            accuracies, gaps = naive((arm, "", ""), number)
            row = found["tests"][test]["arms"][arm]
            further = [theirs((arm, "", ""), seed, number) for seed in range(SEEDS)]
            for place, name in enumerate(("balanced accuracy", "AUC")):
                of = [one[place] for one in further]
                assert row["further"][name]["mean"] == pytest.approx(np.mean(of))
                assert row["further"][name]["sd"] == pytest.approx(np.std(of, ddof=1))
            assert 0 < row["further"]["calibration error"]["mean"] < 1 and "calibration error</th>" in html
            assert row["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
            assert row["gap"]["sd"] == pytest.approx(np.std(gaps, ddof=1)) and row["gap"]["values"] == pytest.approx(
                gaps
            )
        against = found["tests"][test]["arms"]["fair"]["against_baseline"]["gap"]
        assert against["interval"][0] < -0.4 < against["interval"][1] < 0
        assert against["p"] <= against["adjusted_p"] < 0.05
        assert found["tests"][test]["arms"]["idle"]["against_baseline"]["gap"]["adjusted_p"] > 0.05
    assert all(re.search(r"\): a smaller gap: fair[;.]", sentence) for sentence in found["findings"]), found["findings"]
    assert list(found["curves"]["alpha"]["fair"]) == ["0", "0.5", "0.75"], "with the arm itself at its usual value"
    assert found["filters"]["fair"]["cells"]["a × dark"] == {"samples": 40, "kept": 10, "rate": 0.25}
    plot = np.array(Image.open(io.BytesIO(picture)).convert("L"))
    assert plot.shape[0] > 200 and plot.std() > 10
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    gap = found["tests"]["here"]["arms"]["fair"]["gap"]
    assert f"{gap['mean']:.3f} ± {gap['sd']:.3f}" in html and "a × light: 75 %" in html


def test_controls_hold_or_fail_by_what_was_run(study: StudyConfig) -> None:
    same, fair, idle = gather(study)["controls"]
    assert same["held"] and same["numbers"] == {"equal": SEEDS, "of": SEEDS}
    assert not fair["held"] and idle["held"], "a control that betters its arm has failed"
    train = Path(study.root) / "fairalpha0-1" / "train"
    shutil.move(train, f"{train}-own")
    shutil.copytree(Path(study.root) / "trained-0", train)
    try:
        (same, *_) = gather(study)["controls"]
        assert not same["held"] and same["numbers"] == {"equal": SEEDS - 1, "of": SEEDS}
    finally:
        shutil.rmtree(train)
        shutil.move(f"{train}-own", train)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"baseline": "none"}, "no arm 'none'; it has base, fair, idle"),
        ({"sweep": "nowhere"}, "There is no table of a sweep at 'nowhere'"),
        ({"cluster_by": "patient"}, "has no attribute 'patient'; it has"),
    ],
)
def test_what_is_missing_is_named(study: StudyConfig, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        gather(StudyConfig(**{**vars(study), **change}))
    assert says in str(refused.value)
