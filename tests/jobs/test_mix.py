"""A classifier that learns from several datasets at once, of which one is still being written."""

import threading
import time
from pathlib import Path

import pytest
import torch
from rayproj.jobs.train_classifier import Config, worker

from rayproj import config as configuration
from rayproj.data import watermark
from rayproj.data.dataset import Dataset
from rayproj.data.writer import commit_shard
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support import images
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder


def train(world: World, folder: str, out: str, written: bool) -> int:
    values = {
        "data": f"{folder}/synthetic",
        "mix": {f"{folder}/real": 0.25},
        "consumer": "trainer",
        "classifier": {"channels": [8], "dropout": 0.0},
        "augment": {"shift": 1},
        # By such an eps Adam makes little of how a tiny gradient is rounded.
        "train": {"steps": 20, "batch": 8, "engine": {"optimizer": {"lr": 1e-3, "eps": 1e-3}}},
        "run": {"dir": out},
    }
    seen = 0
    if world.rank == 0 and not written:
        dataset = Dataset.create(f"{folder}/synthetic", images.header(60, 6))

        def write() -> None:
            for shard in range(10):
                time.sleep(0.1)
                images.commit(dataset, shard)

        threading.Thread(target=write, daemon=True).start()
    worker(configuration.to_dict(configuration.from_dict(Config, values)), world, Recorder("a"))
    if world.rank == 0:
        seen = watermark.watermarks(Dataset.open(f"{folder}/synthetic"))["trainer"]
    return seen


def test_real_and_synthetic_images_in_every_batch(tmp_path: Path) -> None:
    """Twice over the synthetic ones, first as they are written by one rank, then by two when they are there: the same."""
    images.write(str(tmp_path / "real"), num_samples=30)
    for ranks in (1, 2):
        seen = run_ranks(train, ranks, str(tmp_path), str(tmp_path / f"run-{ranks}"), ranks > 1)
        assert seen[0] == 10, "the producer was told that all is read"
    one, two = (load_ema(Store(str(tmp_path / f"run-{ranks}")))[0] for ranks in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


def test_shares_that_leave_nothing() -> None:
    assert Config(mix={"a": 0.5}).problems() == Config(mix={"a": 0.0}).problems() == []
    assert "together less than 1" in Config(mix={"a": 0.5, "b": 0.5}).problems()[0]
    assert Config(mix={"a": -1.0}).problems()


@pytest.mark.parametrize("where", ["data", "mix"])
def test_images_without_a_label_are_refused(tmp_path: Path, where: str) -> None:
    labelled = images.write(str(tmp_path / "labelled"), num_samples=10)
    unlabelled = Dataset.create(str(tmp_path / "unlabelled"), labelled.header)
    samples = [images.sample(i) | {"label": i % 2 - 1} for i in range(10)]
    commit_shard(unlabelled, 0, samples, "test", 0.1)
    given = {"data": labelled.uri, "mix": {unlabelled.uri: 0.5}} if where == "mix" else {"data": unlabelled.uri}
    values = configuration.to_dict(configuration.from_dict(Config, {**given, "run": {"dir": str(tmp_path / "run")}}))
    with pytest.raises(UserError, match="unlabelled has 5 images without a label"):
        worker(values, World(0, 1, 0, "cpu"), Recorder("a"))
