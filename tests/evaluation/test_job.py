"""The evaluation job on several ranks equals one process, and bias by a group attribute is found."""

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet
from sklearn import metrics

from rayproj import config as configuration
from rayproj.classifiers.augment import AugmentConfig
from rayproj.classifiers.networks import ClassifierConfig
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.engine.checkpoint import CheckpointConfig
from rayproj.engine.engine import EngineConfig, OptimizerConfig
from rayproj.engine.steps import PlainStep
from rayproj.engine.training import Recipe, TrainConfig, train
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.fairness import Judged
from rayproj.evaluation.job import EvaluateConfig, _measured, _table, evaluate
from rayproj.evaluation.skewsize import SkewSizeConfig
from rayproj.evaluation.watermark import key_name, mark
from rayproj.storage.store import Store
from tests.support import regression
from tests.support.ranks import run_ranks

CLASSES = ("zero", "one", "two", "three")
SMALL = ClassifierConfig(channels=(8, 16), dropout=0.0)


@dataclass
class _Run:
    data: str = "???"
    classifier: ClassifierConfig = field(default_factory=lambda: SMALL)


@dataclass
class _Evaluate:
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def write_bars(uri: str, seed: int, size: int = 400) -> Dataset:
    """Class = quarter of the image that is bright; in the group "dark" class three looks like class zero."""
    header = Header(
        "bars", {"image": Field("png", (1, 16, 16)), "label": Field("int"), "tone": Field("str")}, size, 100, CLASSES
    )
    dataset, rng = Dataset.create(uri, header), np.random.default_rng(seed)
    for shard in range(header.num_shards):
        samples = []
        for i in header.shard_range(shard):
            label, tone = i % 4, "light" if rng.random() < 0.5 else "dark"
            image = rng.integers(0, 60, (1, 16, 16))
            quarter = 0 if label == 3 and tone == "dark" else label
            image[:, 4 * quarter : 4 * quarter + 4] += 150
            samples.append({"key": f"{i:08d}", "image": image.astype(np.uint8), "label": label, "tone": tone})
        commit_shard(dataset, shard, samples, "test", 0.0)
    return dataset


def write_marked(root: str) -> None:
    """The test images with a watermark."""
    Path(root, "key").write_bytes(b"k" * 32)
    test = Dataset.open(f"{root}/test")
    said = {"watermark": {"key": key_name(b"k" * 32), "strength": 6.0}}
    dataset, reader = Dataset.create(f"{root}/marked", replace(test.header, provenance=said)), Reader(test)
    for shard in range(test.header.num_shards):
        columns = reader.shard(shard)
        images = mark(columns["image"], b"k" * 32, 6.0)
        samples = [{"key": str(k), "image": image, "label": int(columns["label"][k]), "tone": columns["tone"][k]}
                   for k, image in enumerate(images)]  # fmt: skip
        commit_shard(dataset, shard, samples, "test", 0.0)


def train_only(world: World, root: str) -> None:
    if world.rank == 0:
        write_bars(f"{root}/train", 0)
        write_bars(f"{root}/test", 1)
        write_marked(root)
        text = configuration.to_yaml(configuration.load(_Run, None, [f"data={root}/train"]))
        Store(f"{root}/classifier").put_once("config.yaml", text.encode())
    torch.distributed.barrier()
    train_set = Dataset.open(f"{root}/train")
    settings = TrainConfig(
        steps=60,
        batch=60,
        engine=EngineConfig(ema=0.5, optimizer=OptimizerConfig(lr=5e-3)),
        checkpoint=CheckpointConfig(every_seconds=0),
    )
    batches = Batches(Reader(train_set, ["image", "label"]), Shuffled(400, 100, 60, 0), world.rank, world.world_size)
    task = ClassificationTask(SMALL, train_set.header, 0, AugmentConfig(0, False))
    link = regression.Recorder("a")
    train(Recipe(task, PlainStep(60, 0, world.world_size), batches, settings), world, Store(f"{root}/classifier"), link)


def train_and_evaluate(world: World, root: str) -> dict[str, Any]:
    train_only(world, root)
    return evaluate(config(root), world, regression.Recorder("a"))


def evaluate_only(world: World, root: str) -> dict[str, Any]:
    whole = evaluate(config(root), world, regression.Recorder("b"), Store(f"{root}/evaluate"))
    few = replace(config(root), reference="", synthetic={}, learned_from={}, watermark_key="", bootstraps=0)
    alone = evaluate(few, world, regression.Recorder("c"))
    assert alone["accuracy"] == whole["accuracy"] and alone["quality"]["measures"] == {} and alone["watermark"] is None
    return whole


def config(root: str) -> EvaluateConfig:
    return EvaluateConfig(
        test=f"{root}/test",
        reference=f"{root}/train",
        classifiers={"real": f"{root}/classifier"},
        synthetic={"same": f"{root}/train", "marked": f"{root}/marked"},
        watermark_key=f"{root}/key",
        learned_from={"same": f"{root}/train"},
        samples=120,
        feature_size=32,
        batch=50,
        groups=["tone"],
        quality_by=["tone"],
        tests={"again": f"{root}/test", "seen": f"{root}/train"},
        bootstraps=20,
        skewsize=SkewSizeConfig(plain=True, permutations=50, bootstraps=20),
        predictions=True,
    )


def test_the_table_of_predictions_holds_sets_of_which_no_group_is_known() -> None:
    judged = Judged(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]), ())
    unknown, known = (np.array(values, object) for values in ([None, None], ["dark", None]))
    data = _table(
        {"test": {"a": judged}, "out": {"a": judged}}, {"test": {"tone": known}, "out": {"tone": unknown}}, ("x", "y")
    )
    table = parquet.read_table(io.BytesIO(data)).to_pydict()
    assert table["tone"] == ["dark", None, None, None] and table["prediction"] == ["x"] * 4


def measured_in_threes(world: World, together: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    labels, draws = np.arange(240) % 3, rng.integers(0, 2, (3, 240))
    judged = {"a": Judged(labels, rng.dirichlet(np.ones(3), 240))}
    attributes = {name: column.astype(object) for name, column in zip("xyz", draws, strict=True)}
    told = SkewSizeConfig(together=together, permutations=0, bootstraps=0)
    given = EvaluateConfig(groups=list("xyz"), skewsize=told, group_examples=5, bootstraps=0)
    found = _measured(given, tuple("abc"), judged, attributes, world)
    return {"found": found, "predictions": judged["a"].predictions, "labels": labels, "draws": draws}


def test_intersections_of_as_many_groups_as_asked_for() -> None:
    assert list(run_ranks(measured_in_threes, 1, 1)[0]["found"]["skewsize"]["a"]) == ["x", "y", "z"]
    by = run_ranks(measured_in_threes, 1, 3)[0]
    for part in ("skewsize", "fairness"):
        assert list(by["found"][part]["a"])[-1] == "x × y × z" and len(by["found"][part]["a"]) == 7
    rates: dict[str, list[bool]] = {}
    for i, right in enumerate(by["predictions"] == by["labels"]):
        rates.setdefault(" × ".join(str(column[i]) for column in by["draws"]), []).append(bool(right))
    expected = {name: sum(of) / len(of) for name, of in rates.items()}
    assert by["found"]["skewsize"]["a"]["x × y × z"]["accuracy_by_group"] == pytest.approx(expected)


def test_ranks_share_the_work_and_the_planted_bias_is_found(tmp_path: Path) -> None:
    alone = run_ranks(train_and_evaluate, 1, str(tmp_path))[0]
    shared = run_ranks(evaluate_only, 2, str(tmp_path))
    for found in shared:
        assert found["confusion"] == alone["confusion"] and found["skewsize"] == alone["skewsize"]
        for name, measures in alone["quality"]["measures"].items():
            assert found["quality"]["measures"][name].keys() == measures.keys()
            for key, value in measures.items():
                expected = None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)
                assert found["quality"]["measures"][name][key] == expected, key
    assert 0.8 < alone["accuracy"]["real"]["value"] < 1 and alone["accuracy"]["real"]["n"] == 400
    distance = alone["quality"]["frechet_distance"]
    assert distance["same"] == pytest.approx(0, abs=1e-3) and distance["real"] > 1
    same = alone["quality"]["measures"]["same"]
    assert same["precision"] == same["coverage"] == 1 and same["kernel_distance"] < 0
    assert same["nearest"] == 0 and same["copying"] < -10, "they are the training images themselves"
    cells = alone["quality"]["by_cell"]
    assert set(cells) == {"real", "same", "marked"} and set(cells["same"]["cells"]) == {"dark", "light"}
    assert all(m["kernel_distance"] < 0 < m["recall"] for m in cells["same"]["cells"].values())
    assert sum(m["images"] for m in cells["marked"]["cells"].values()) == 120 and not cells["marked"]["left_out"]
    for found in shared:
        for name, one in cells.items():
            assert found["quality"]["by_cell"][name]["worst"] == one["worst"]
    found_marks = alone["watermark"]["sets"]
    assert set(found_marks) == {"real", "marked"}, "of those that are said to have the mark of this key"
    assert found_marks["marked"]["as they are"]["chance"] < 1e-6 < found_marks["real"]["as they are"]["chance"]
    assert found_marks["real"]["as they are"]["found"] < 0.05
    assert found_marks["marked"]["as they are"]["area"] > 0.9
    bias = alone["skewsize"]["real"]["tone"]
    assert max(bias["effects"], key=bias["effects"].get) == "three" and bias["effects"]["three"] > 0.5
    assert bias["value"] > 0 and bias["corrected"] is False
    fair = alone["fairness"]["real"]["tone"]["measures"]["accuracy"]
    assert fair["worst_group"] == "dark" and fair["gap"] == pytest.approx(bias["accuracy_gap"])
    again, seen = alone["tests"]["again"], alone["tests"]["seen"]
    assert again == {key: alone[key] for key in ("accuracy", "confusion", "skewsize", "fairness")}
    assert shared[0]["tests"] == shared[1]["tests"] == alone["tests"] and seen["accuracy"] != again["accuracy"]
    kept = pd.read_parquet(tmp_path / "evaluate" / "predictions.parquet")
    for test, found in alone["tests"].items():
        table = kept[kept.test == test]
        assert len(table) == 400
        assert (
            metrics.confusion_matrix(table.label, table.prediction, labels=alone["classes"]).tolist()
            == found["confusion"]["real"]
        )
        dark = table[table.tone == "dark"]
        by = found["fairness"]["real"]["tone"]["measures"]["accuracy"]["by_group"]
        assert metrics.accuracy_score(dark.label, dark.prediction) == pytest.approx(by["dark"])
        assert [alone["classes"][np.argmax(p)] for p in table.probabilities] == table.prediction.tolist()


def test_a_config_that_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluate.reference must name real images"):
        configuration.load(_Evaluate, None, ["evaluate.synthetic={a: b}", "evaluate.test=t"])
    with pytest.raises(UserError, match=r"'test' is the name of evaluate.test"):
        configuration.load(_Evaluate, None, ["evaluate.tests={test: b}", "evaluate.test=t"])


def test_what_cannot_be_evaluated_is_said(tmp_path: Path) -> None:
    write_bars(f"{tmp_path}/test", 1, 40)
    with pytest.raises(UserError, match="There is no run at"):
        evaluate(replace(config(str(tmp_path)), tests={}), World(0, 1, 0, "cpu"), regression.Recorder("c"))


def test_the_name_of_the_test_images_is_taken() -> None:
    config = EvaluateConfig(test="x", reference="y", synthetic={"real": "z"})
    assert config.problems() == ["evaluate.synthetic: 'real' names the test images; give the set another name."]
