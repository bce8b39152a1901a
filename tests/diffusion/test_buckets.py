"""Images of several aspect ratios: from files through one model to images of each, on one rank and on two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rayproj.jobs.train_diffusion import Config, worker

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.reader import Reader
from rayproj.data.sources import SourceConfig, SourceKind
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.storage.store import Store
from rayproj.synthesis.plan import GenerateConfig, plan
from rayproj.synthesis.synthesizer import Synthesizer
from tests.support import runs
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

BUCKETS = [[16, 16], [8, 16], [16, 8]]
SIZES = {"16x16": (40, 40), "8x16": (30, 62), "16x8": (64, 30)}  # height, width of files of each
COUNTS = {"16x16": 12, "8x16": 6, "16x8": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng, lines = tmp_path_factory.mktemp("buckets"), np.random.default_rng(0), ["file,label"]
    for name, (height, width) in SIZES.items():
        for k in range(COUNTS[name]):
            rough = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
            Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(path / f"{name}-{k}.png")
            lines.append(f"{name}-{k}.png,{'ab'[k % 2]}")
    (path / "labels.csv").write_text("\n".join(lines))
    source = SourceConfig(kind=SourceKind.image_folder, path=str(path), buckets=BUCKETS)
    import_dataset(ImportConfig(source=source, out=str(path / "images"), shard_size=4), lambda event: None)
    run_ranks(encode, 1, str(path))
    for ranks in (1, 2):
        run_ranks(train, ranks, str(path), f"{path}/denoiser-{ranks}")
    return path


def encode(world: World, folder: str) -> None:
    images = Dataset.open(f"{folder}/images/train/16x16")
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, {"channels": [8, 8], "norm_groups": 4})
    for name in SIZES:
        runs.latents(f"{folder}/latents/{name}", Dataset.open(f"{folder}/images/train/{name}"), autoencoder)


def settings(folder: str, out: str) -> dict[str, Any]:
    first, *others = (f"{folder}/latents/{name}" for name in SIZES)
    return {
        "diffusion": {
            "latents": first,
            "buckets": others,
            "denoiser": {"channels": [16, 32], "head_dim": 16, "norm_groups": 8},
        },
        "train": {"steps": 12, "batch": 4, "engine": {"optimizer": {"lr": 1e-3}}},
        "run": {"dir": out},
    }


def train(world: World, folder: str, out: str) -> None:
    config = configuration.from_dict(Config, settings(folder, out))
    if world.rank == 0:
        Store(out).put_once("config.yaml", configuration.to_yaml(config).encode())
    worker(configuration.to_dict(config), world, Recorder("a"))


def test_an_image_goes_where_its_shape_fits(folder: Path) -> None:
    for name, size in SIZES.items():
        dataset = Dataset.open(str(folder / "images" / "train" / name))
        height, width = map(int, name.split("x"))
        assert dataset.header.num_samples == COUNTS[name]
        assert dataset.header.fields["image"].shape == (3, height, width)
        latents = Dataset.open(str(folder / "latents" / name)).header
        assert latents.fields["moments"].shape == (8, height // 2, width // 2)
        # Filled and cut, not squeezed: as torch resizes the middle of a file that has the bucket's ratio.
        found = Reader(dataset).gather(np.arange(COUNTS[name]))["image"]
        file = torch.from_numpy(np.moveaxis(np.asarray(Image.open(folder / f"{name}-0.png")), -1, 0).copy()).float()
        cut_h, cut_w = min(size[0], size[1] * height // width), min(size[1], size[0] * width // height)
        top, left = (size[0] - cut_h) // 2, (size[1] - cut_w) // 2
        middle = file[None, :, top : top + cut_h, left : left + cut_w]
        small = torch.nn.functional.interpolate(middle, size=(height, width), mode="bicubic", antialias=True)
        assert min(np.abs(image - small[0].numpy()).mean() for image in found) < 2


def test_two_ranks_learn_what_one_does(folder: Path) -> None:
    """Each step is of one shape on both, so that no rank waits for another, and rounding alone differs."""
    one, two = (load_ema(Store(str(folder / f"denoiser-{ranks}")))[0] for ranks in (1, 2))
    assert one.keys() == two.keys()
    # Of twelve steps of 1e-3: where a gradient is nearly none, Adam makes much of how it is rounded.
    assert max(float((two[name] - tensor).abs().max()) for name, tensor in one.items()) < 1e-3
    assert torch.cat([(two[name] - tensor).flatten() for name, tensor in one.items()]).abs().mean() < 1e-5


@pytest.mark.parametrize("size", [[], [8, 16], [16, 8], [16, 24]])
def test_any_of_the_sizes_can_be_drawn(folder: Path, size: list[int]) -> None:
    out = str(folder / f"drawn-{'x'.join(map(str, size))}")
    config = GenerateConfig(str(folder / "denoiser-1"), out, samples=4, size=size, sampler=SamplerConfig(2))
    Dataset.create(out, plan(config, 0))
    samples = Synthesizer({"out": out, "batch": 4}, "cpu").make(0)
    assert all(sample["image"].shape == (3, *(size or [16, 16])) for sample in samples)
    assert len({sample["image"].tobytes() for sample in samples}) == 4


def test_what_does_not_fit_is_said(folder: Path) -> None:
    config = GenerateConfig(str(folder / "denoiser-1"), str(folder / "x"), size=[16, 18])
    with pytest.raises(UserError, match=r"size=\[16, 18\]: the model of .* draws sides that are multiples of 4"):
        plan(config, 0)
    values = settings(str(folder), "x")["diffusion"]
    header = Dataset.open(values["latents"]).header
    for change, says in (
        ({"denoiser": {"network": "dit"}}, "diffusion.buckets of other shapes are for a U-Net of our own"),
        ({"denoiser": {"channels": [16] * 4, "norm_groups": 8, "head_dim": 16}}, "take multiples of 8; choose other"),
    ):
        task = DiffusionTask(configuration.from_dict(DiffusionConfig, {**values, **change}), header, 0)
        with pytest.raises(UserError, match=says):
            task.take([Dataset.open(uri).header for uri in values["buckets"]])
