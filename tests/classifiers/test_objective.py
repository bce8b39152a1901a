"""Losses for rare groups, against formulas written out; and that they do what they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rayproj.jobs.train_classifier import Config, task_of, worker  # type: ignore[attr-defined]
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj.classifiers import model as classifiers
from rayproj.classifiers.objective import FIXED, GROUP_WEIGHTS, Balance, Loss, Objective, ObjectiveConfig
from rayproj.data.cells import Cells
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

CELLS = Cells(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2]), ("a", "b", "c"))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    row = torch.stack([torch.arange(10), torch.zeros(10).long(), torch.zeros(10).long()], 1)
    return torch.randn(10, 4), torch.randint(0, 4, (10,)), row


def test_the_focal_loss_is_its_formula_and_at_zero_cross_entropy() -> None:
    logits, label, row = batch()
    p = torch.tensor([logits[i].softmax(0)[label[i]] for i in range(10)])
    found = Objective(ObjectiveConfig(Loss.focal, gamma=2.0))(nn.Module(), logits, label, row)
    torch.testing.assert_close(found, -((1 - p) ** 2) * p.log())
    plain = Objective(ObjectiveConfig(Loss.focal, gamma=0.0))(nn.Module(), logits, label, row)
    torch.testing.assert_close(plain, F.cross_entropy(logits, label, reduction="none"))


@pytest.mark.parametrize("wanted", [{"loss": "focal", "gamma": 3.0}, {"label_smoothing": 0.2}])
def test_a_job_learns_by_the_loss_that_it_was_told(wanted: dict[str, Any]) -> None:
    """Also where no cells are asked for."""
    images = Header("images", {"image": Field("png", (1, 8, 8)), "label": Field("int")}, 10, 10, ("a", "b", "c", "d"))
    task = task_of(
        configuration.from_dict(Config, {"data": "there", "run": {"dir": "there"}, "objective": wanted}), images
    )
    logits, label, row = batch()
    expected = Objective(configuration.from_dict(ObjectiveConfig, wanted))(nn.Module(), logits, label, row)
    torch.testing.assert_close(task.objective(nn.Module(), logits, label, row), expected)
    assert not torch.allclose(expected, F.cross_entropy(logits, label, reduction="none"))


def test_reweighting_makes_every_cell_weigh_the_same() -> None:
    logits, label, row = batch()
    found = Objective(ObjectiveConfig(balance=Balance.reweight), CELLS)(nn.Module(), logits, label, row)
    plain = F.cross_entropy(logits, label, reduction="none")
    weights = (found / plain).numpy()
    assert weights.mean() == pytest.approx(1)
    assert [weights[CELLS.numbers == c].sum() for c in range(3)] == pytest.approx([10 / 3] * 3)


@pytest.mark.parametrize("adjustment", [0.0, 2.0])
def test_group_dro_is_its_algorithm(adjustment: float) -> None:
    """Sagawa et al. 2020, algorithm 1, over a few steps."""
    objective = Objective(ObjectiveConfig(Loss.group_dro, dro_step=0.5, dro_adjustment=adjustment), CELLS)
    model, q = nn.Linear(3, 3), np.ones(3) / 3
    objective.prepare(model)
    for step in range(4):
        torch.manual_seed(step)
        logits, label, row = torch.randn(10, 4, requires_grad=True), torch.randint(0, 4, (10,)), batch()[2]
        losses = F.cross_entropy(logits, label, reduction="none")
        means = np.array([losses[CELLS.numbers == c].mean().item() for c in range(3)])
        q = q * np.exp(0.5 * (means + adjustment / np.sqrt([6, 2, 2])))
        q /= q.sum()
        found = objective(model, logits, label, row).mean()
        expected = sum(w * losses[CELLS.numbers == c].mean() for c, w in enumerate(q))
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad(found, logits, retain_graph=True)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-6)
    kept = getattr(model, GROUP_WEIGHTS)
    np.testing.assert_allclose((kept.double() / FIXED).softmax(0), q, atol=1e-5)
    before = kept.clone()
    model.eval()
    objective(model, *batch())
    assert torch.equal(kept, before), "what is only measured teaches nothing"
    model.bfloat16()
    assert torch.equal(getattr(model, GROUP_WEIGHTS), before)


def dro_on(world: World) -> tuple[list[float], list[int]]:
    """This rank's losses of its half, and the weights afterwards."""
    objective = Objective(ObjectiveConfig(Loss.group_dro, dro_step=0.5), CELLS)
    model = nn.Linear(3, 3)
    objective.prepare(model)
    logits, label, row = batch()
    mine = slice(world.rank * 10 // world.world_size, (world.rank + 1) * 10 // world.world_size)
    losses = objective(model, logits[mine], label[mine], row[mine])
    return losses.tolist(), getattr(model, GROUP_WEIGHTS).tolist()


def test_group_dro_of_two_ranks_is_that_of_one() -> None:
    (whole, weights), two = run_ranks(dro_on, 1)[0], run_ranks(dro_on, 2)
    assert [found[1] for found in two] == [weights, weights]
    assert [v for found in two for v in found[0]] == pytest.approx(whole, rel=1e-5)


def shortcut(uri: str, samples: int, agree: float, seed: int) -> Dataset:
    """The class is a faint difference of two halves; the tint, which agrees with it as often as `agree`, is plain to see."""
    fields = {"image": Field("png", (3, 8, 8)), "label": Field("int"), "tint": Field("str")}
    dataset = Dataset.create(uri, Header("shortcut", fields, samples, 200, ("left", "right")))
    rng = np.random.default_rng(seed)
    for shard in range(dataset.header.num_shards):
        rows = []
        for i in dataset.header.shard_range(shard):
            label = int(rng.integers(2))
            tint = label if rng.random() < agree else 1 - label
            image = rng.normal(110, 40, (3, 8, 8))
            image[:, :, :4] += 8 if label == 0 else -8
            image[0 if tint else 2] += 80
            rows.append({"key": f"{i:08d}", "image": image.clip(0, 255).astype(np.uint8), "label": label,
                         "tint": "red" if tint else "blue"})  # fmt: skip
        commit_shard(dataset, shard, rows, "test", 0.0)
    return dataset


ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "oversample": {"balance": "oversample", "groups": ["tint"]},
    "reweight": {"balance": "reweight", "groups": ["tint"]},
    "group_dro": {"loss": "group_dro", "groups": ["tint"], "dro_step": 0.3},
}


def train_arms(world: World, folder: str) -> None:
    for name, objective in ARMS.items():
        values = {
            "data": f"{folder}/train",
            "augment": {"shift": 0, "flip": False},
            "objective": objective,
            "classifier": {"channels": [16, 16], "dropout": 0.0},
            "train": {"steps": 150, "batch": 128, "engine": {"ema": 0.9, "optimizer": {"lr": 3e-3}}},
            "run": {"dir": f"{folder}/{name}"},
        }
        train_one(world, values)
    values |= {"start": {"run": f"{folder}/plain"}, "trainable": "^head", "run": {"dir": f"{folder}/last"}}
    values |= {"objective": ARMS["oversample"]}
    train_one(world, values)


def train_one(world: World, values: dict[str, Any]) -> None:
    config = configuration.from_dict(Config, values)
    Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
    worker(configuration.to_dict(config), world, Recorder("a"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arms")
    shortcut(f"{path}/train", 6000, 0.97, 0)
    shortcut(f"{path}/test", 1600, 0.5, 1)
    run_ranks(train_arms, 1, str(path))
    return path


def worst_group(folder: Path, name: str) -> float:
    columns = Reader(Dataset.open(f"{folder}/test")).gather(np.arange(1600))
    predicted = classifiers.load(f"{folder}/{name}", "cpu")(torch.from_numpy(columns["image"])).argmax(1).numpy()
    right = predicted == columns["label"]
    cells = [right[(columns["label"] == y) & (columns["tint"] == t)].mean() for y in (0, 1) for t in ("red", "blue")]
    return float(min(cells))


@pytest.mark.parametrize("name", ["oversample", "reweight", "group_dro"])
def test_each_arm_helps_the_worst_group(folder: Path, name: str) -> None:
    assert worst_group(folder, name) > worst_group(folder, "plain") + 0.3


def test_the_last_layer_alone_is_trained_from_another_run(folder: Path) -> None:
    before, after = load_ema(Store(f"{folder}/plain"))[0], load_ema(Store(f"{folder}/last"))[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": {"gamma": -1.0}}, "objective.gamma must not be negative"),
        ({"objective": {"label_smoothing": 1.0}}, "label_smoothing must lie in"),
        ({"objective": {"loss": "group_dro", "balance": "reweight"}}, "both weigh the cells"),
        ({"objective": {"loss": "group_dro"}, "consumer": "c"}, "the dataset must be complete"),
        ({"trainable": "("}, "is no regular expression"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({"data": "x", "run": {"dir": "y"}, **wrong}))
    with pytest.raises(UserError, match=said):
        configuration.load(Config, tmp_path / "c.yaml")
