"""Images without labels: from the files of a medical set to a model that learns from them as of no class."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rayproj.jobs.train_diffusion import Config, worker

from rayproj import config as configuration
from rayproj.data.cells import cells_of
from rayproj.data.dataset import Dataset
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.loader import pooled
from rayproj.data.sources import SourceConfig, SourceKind
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.world import World
from rayproj.storage.store import Store
from rayproj.synthesis.plan import GenerateConfig, plan
from rayproj.synthesis.synthesizer import Synthesizer
from tests.support import medical, runs
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

HOSPITALS = ["0", "3", "4"]
SIZES = {"train": 18, "unlabelled": 24}
BATCH = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unlabelled")
    medical.write_camelyon17(path, side=16)
    both = {"path": f"{path}/camelyon17_v1.0", "unlabelled": f"{path}/camelyon17_unlabeled_v1.0"}
    source = SourceConfig(SourceKind.camelyon17, image_size=16, **both)
    import_dataset(ImportConfig(source=source, out=f"{path}/images", shard_size=8), lambda event: None)
    run_ranks(train, 1, str(path))
    return path


def train(world: World, folder: str) -> None:
    images = {part: Dataset.open(f"{folder}/images/{part}") for part in SIZES}
    autoencoder = runs.autoencoder(
        world, f"{folder}/autoencoder", images["train"], {"channels": [8, 8], "norm_groups": 4}
    )
    for part, dataset in images.items():
        runs.latents(f"{folder}/latents/{part}", dataset, autoencoder, properties={"hospital": HOSPITALS})
    values = {**settings(folder), "train": {"steps": 12, "batch": BATCH}, "run": {"dir": f"{folder}/denoiser"}}
    config = configuration.from_dict(Config, values)
    Store(config.run.dir).put_once("config.yaml", configuration.to_yaml(config).encode())
    worker(configuration.to_dict(config), world, Recorder("a"))


def settings(folder: str, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "diffusion": {
            "latents": f"{folder}/latents/train",
            "buckets": [f"{folder}/latents/unlabelled"],
            "denoiser": {"channels": [16, 32], "head_dim": 16, "norm_groups": 8},
            "conditions": {"label": {"dropout": dropout}, "hospital": {"dropout": dropout}},
        }
    }


def opened(folder: Path) -> tuple[DiffusionTask, list[Dataset]]:
    config = configuration.from_dict(DiffusionConfig, settings(str(folder))["diffusion"])
    datasets = [Dataset.open(f"{folder}/latents/{part}") for part in SIZES]
    return DiffusionTask(config, datasets[0].header, seed=0), datasets


def test_they_have_their_share_of_every_batch_and_are_of_no_class(folder: Path) -> None:
    task, datasets = opened(folder)
    batches = pooled(datasets, task.fields, BATCH, 0, 0, 1)
    found = [batches.at(step) for step in range(12)]  # twice through each
    without = [int((batch["label"] < 0).sum()) for batch in found]
    assert set(without) <= {4} and all(len(batch["row"]) == BATCH for batch in found), "7 · 24 / 42"
    seen = Counter(torch.cat([batch["row"][:, 0] for batch in found]).tolist())
    assert sorted(seen) == list(range(42)) and set(seen.values()) == {2}
    assert all(((batch["label"] < 0) == (batch["row"][:, 0] >= 18)).all() for batch in found)
    assert set(torch.cat([batch["hospital"] for batch in found]).tolist()) == {0, 1, 2}
    assert [d.record(0).class_counts for d in datasets][1] == {} and task.conditions.values == {
        "label": 2,
        "hospital": 3,
    }  # type: ignore[union-attr]
    names = set(cells_of(datasets, ["label", "hospital"]).names)
    assert names == {f"{label} × {hospital}" for label in ("normal", "tumour", "?") for hospital in HOSPITALS}


def test_they_move_the_model_as_none_does_and_no_class(folder: Path) -> None:
    task, datasets = opened(folder)
    model = task.build()
    batch = pooled(datasets[1:], task.fields, BATCH, 0, 0, 1).at(0)
    task.losses(model, batch).mean().backward()
    tables = {name: model.embedding.values[name].weight.grad.abs().sum(1) for name in ("label", "hospital")}  # type: ignore[union-attr,index]
    assert (tables["label"] > 0).tolist() == [False, False, True], "of normal, of tumour, of none"
    there = {int(value) for value in batch["hospital"]}
    assert (tables["hospital"] > 0).tolist() == [k in there for k in range(3)] + [False]


def test_a_model_of_both_draws_classes_of_hospitals_by_shares(folder: Path) -> None:
    weights, _ = load_ema(Store(str(folder / "denoiser")))
    start = {n: p.detach().flatten() for n, p in opened(folder)[0].build().named_parameters()}
    moved = (weights["embedding.values.label.weight"] - start["embedding.values.label.weight"]).reshape(3, -1)
    assert (moved.abs().sum(1) > 0).all(), "both classes, and none though no label was left out"
    shares = [{"of": {"label": "normal"}, "share": 3}, {"of": {"label": "tumour"}, "share": 1}]
    values = {
        "model": f"{folder}/denoiser",
        "out": f"{folder}/drawn",
        "samples": 24,
        "shard_size": 24,
        "shares": shares,
    }
    config = configuration.from_dict(GenerateConfig, {**values, "properties": {"hospital": HOSPITALS}})
    config.sampler = SamplerConfig(1)
    Dataset.create(config.out, plan(config, 0))
    drawn = Counter((s["label"], s["hospital"]) for s in Synthesizer({"out": config.out, "batch": 24}, "cpu").make(0))
    assert drawn == {(label, hospital): (6, 2)[label] for label in (0, 1) for hospital in range(3)}
