"""Larger images of smaller ones: from the cached copies to the shards of jobs/upscale.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.synthesis.plan import GenerateConfig
from rayproj.synthesis.plan import plan as generate_plan
from rayproj.synthesis.upscaler import UpscaleConfig, Upscaler, plan
from tests.support import runs
from tests.support.ranks import run_ranks

SETTINGS = {"label": {"dropout": 0.2}, "low": {"dropout": 0.1, "noise": 0.3}}


def write_images(uri: str, side: int, **provenance: Any) -> Dataset:
    fields = {"image": Field("png", (3, side, side)), "label": Field("int"), "seed": Field("int")}
    header = Header("faces", fields, 12, 6, ("a", "b"), provenance=provenance)
    dataset, rng = Dataset.create(uri, header), np.random.default_rng(0)
    for shard in (0, 1):
        samples = [
            {
                "key": f"{i:08d}",
                "image": rng.integers(0, 256, (3, side, side), dtype=np.uint8),
                "label": i % 2,
                "seed": 7,
            }
            for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.1)
    return dataset


def train_upscaler(world: World, folder: str) -> None:
    images = write_images(f"{folder}/images", 16)
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, {"channels": [8, 8], "norm_groups": 4})
    latents = runs.latents(f"{folder}/latents", images, autoencoder, low=8)
    network = {"channels": [16, 32], "head_dim": 16, "norm_groups": 8}
    runs.denoiser(world, f"{folder}/upscaler", latents, {"denoiser": network, "conditions": SETTINGS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faces")
    run_ranks(train_upscaler, 1, str(path))
    write_images(str(path / "small"), 8, private={"epsilon": 8.0})
    return path


def config_of(folder: Path, **changes: Any) -> UpscaleConfig:
    places = {"model": str(folder / "upscaler"), "images": str(folder / "small"), "out": str(folder / "large")}
    return UpscaleConfig(**{**places, "noise": 0.1, "batch": 4, "sampler": SamplerConfig(3), **changes})


def test_the_smaller_copy_is_what_pillow_makes(folder: Path) -> None:
    found = Reader(Dataset.open(str(folder / "latents"))).gather(np.arange(12))["low"]
    large = Reader(Dataset.open(str(folder / "images"))).gather(np.arange(12))["image"]
    for image, small in zip(large, found, strict=True):
        theirs = Image.fromarray(np.moveaxis(image, 0, -1)).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.abs(np.moveaxis(np.asarray(theirs), -1, 0).astype(int) - small).max() <= 2


def test_shards_are_larger_and_else_the_same(folder: Path) -> None:
    config = config_of(folder)
    header = plan(config, 3)
    assert header.fields["image"].shape == (3, 16, 16) and header.num_samples == 12
    assert header.provenance["private"] == {"epsilon": 8.0}, "what the small images cost, the large ones cost"
    Dataset.create(config.out, header)
    maker = Upscaler({"out": config.out, "batch": 4}, "cpu")
    samples = maker.make(1)
    small = Reader(Dataset.open(config.images)).gather(np.arange(6, 12))
    assert [s["label"] for s in samples] == small["label"].tolist() and samples[0]["seed"] == 7
    again = Upscaler({"out": config.out, "batch": 1}, "cpu").make(1)
    for one, same in zip(again, samples, strict=True):
        assert one["image"].shape == (3, 16, 16)
        assert np.abs(one["image"].astype(int) - same["image"]).max() <= 1, "whatever the batch"
    given = {name: column[:1] for name, column in small.items()}
    drawn = maker._draw(np.array([6]), given)
    assert not np.array_equal(drawn, maker._draw(np.array([6]), {**given, "image": 255 - given["image"]}))
    assert not np.array_equal(drawn, maker._draw(np.array([6]), {**given, "label": 1 - given["label"]}))


def test_what_does_not_go_together_is_said(folder: Path) -> None:
    for changes, says in (
        ({"images": str(folder / "images")}, r"have the shape \(3, 16, 16\), and the model .* of \(3, 8, 8\)"),
        ({"noise": 0.5}, r"upscale.noise=0.5 is more than the model was trained with \(0.3\)"),
        ({"model": str(folder / "nothing")}, "There is no trained model at"),
    ):
        with pytest.raises(UserError, match=says):
            plan(config_of(folder, **changes), 0)
    with pytest.raises(UserError, match=r"makes images larger, and draws none by itself; give it to jobs/upscale\.py"):
        generate_plan(GenerateConfig(model=str(folder / "upscaler"), out=str(folder / "x")), 0)
