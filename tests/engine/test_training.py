"""The loop: what is measured on held-out examples, and a training of no steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayproj.engine.checkpoint import commits, load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support import regression
from tests.support.ranks import run_ranks


class Measured(regression.Regression):
    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": sum(p.sum().item() for p in model.parameters())}


def validated(world: World, uri: str) -> dict[str, Any]:
    settings = regression.config(10, every_steps=5)
    settings.validate_every = 3
    return regression.run(world, f"{uri}/run", settings, "a", Measured())


def test_held_out_examples_are_measured_on_the_averaged_weights(tmp_path: Path) -> None:
    found = run_ranks(validated, 2, str(tmp_path))[0]
    rows = [e for e in found["events"] if e["type"] == "metrics"]
    measured = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    # Every third step and the last, each in the report after it.
    assert list(measured) == [4, 6, 10]
    last = sum(tensor.sum().item() for tensor in found["ema"].values())
    assert measured[10] == pytest.approx(last, rel=1e-5)
    kept = {c.step: c.metrics["val_loss"] for c in commits(Store(str(tmp_path / "run")))}
    assert kept == {5: measured[4], 10: measured[10]}, "so the best can be kept by it"


class Pretrained(regression.Regression):
    starts_trained = True


def without_steps(world: World, uri: str) -> str:
    regression.run(world, f"{uri}/pretrained", regression.config(0), "a", Pretrained())
    try:
        regression.run(world, f"{uri}/run", regression.config(0), "a")
    except UserError as error:
        return str(error)
    return ""


def test_no_steps_are_a_training_where_there_is_something_to_keep(tmp_path: Path) -> None:
    assert "There are no steps to train" in run_ranks(without_steps, 2, str(tmp_path))[0]
    weights, commit = load_ema(Store(str(tmp_path / "pretrained")))
    assert commit.step == 0
    for name, tensor in regression.Regression().build().state_dict().items():
        assert torch.equal(weights[name], tensor.flatten())
