"""The large chains of configs/, shrunk by overrides alone, with everything that they name: trained and drawn from."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayproj.data.cells import cells_of
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from tests.support import medical, pipelines
from tests.support.commands import ROOT, run

pytestmark = pytest.mark.slow
ONE = "cluster.ranks=1"
SHORT = ["train.steps=3", "train.batch=4", "train.preview_every=0", ONE]
UNET = "diffusion.denoiser={channels: [16, 32], head_dim: 16, norm_groups: 8, layers_per_block: 1}"


def stage(name: str, *overrides: str) -> list[str]:
    return [f"{name}.{override}" for override in overrides]


def write_images(folder: Path, side: int, count: int = 24) -> None:
    """Images of two classes with a column of captions and one of splits."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "split", "caption"])
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            rows.writerow([f"{i}.png", "ab"[i % 2], "test" if i % 6 == 5 else "train", f"a picture of {'ab'[i % 2]}"])


def source(folder: Path, side: int, *more: str) -> list[str]:
    place = f"data.source.path={folder}/images"
    return stage("import_data", place, f"data.source.image_size={side}", "data.shard_size=8", *more)


def cifar10(folder: Path) -> list[str]:
    autoencoder = (
        "autoencoder={channels: [8, 16], norm_groups: 4, perceptual: 0.5, adversarial: 0.05, adversarial_from: 1}"
    )
    kept = ["train.checkpoint={every_steps: 1, keep_every: 1}", "train.engine.ema_widths=[0.05,0.1]", "train.steps=12"]
    return [
        *source(folder, 32),
        *stage("train_autoencoder", autoencoder, *SHORT),
        *stage("encode_latents", "pool.actors=1"),
        *stage("train_diffusion", UNET, *SHORT, *kept),
        *stage("generate", "generate.samples=8", "generate.shard_size=4", "generate.sampler.steps=2", "pool.actors=1"),
        *stage("evaluate", "evaluate.samples=4"),
    ]


def imagenet256(folder: Path) -> list[str]:
    network = "diffusion.denoiser={network: dit, layers: 1, heads: 2, head_dim: 8, patch: 2}"
    return [
        *source(folder, 16),
        *stage("train_autoencoder", f"autoencoder.weights={folder}/models/vae", ONE),
        *stage("encode_latents", "pool.actors=1"),
        *stage("train_diffusion", network, *SHORT),
        *stage("generate", "generate.samples=4", "generate.shard_size=2", "generate.sampler.steps=3", "pool.actors=1"),
    ]


def stable_diffusion(folder: Path) -> list[str]:
    weights = f"diffusion.denoiser.weights={folder}/models/unet"
    return [
        *source(folder, 16),
        *stage("train_autoencoder", f"autoencoder.weights={folder}/models/vae", ONE),
        *stage("encode_latents", f"text.encoder={folder}/models/text_encoder", "text.tokens=12", "pool.actors=1"),
        *stage("base", weights, ONE),
        *stage("train_diffusion", weights, *SHORT, "train.micro_batch=2", "diffusion.lora.rank=2"),
        *stage("generate", "generate.samples=4", "generate.shard_size=2", "generate.sampler.steps=3", "pool.actors=1"),
    ]


def emoji(folder: Path) -> list[str]:
    return [
        *stage("train_autoencoder", "autoencoder={channels: [8, 8, 16], norm_groups: 4, latent_channels: 4}", *SHORT),
        *stage("encode_latents", "pool.actors=1"),
        *stage("train_diffusion", UNET, *SHORT),
        *stage("generate", "generate.sampler.steps=2"),
    ]


def emoji_gpu(folder: Path) -> list[str]:
    return [
        *stage("train_autoencoder", "autoencoder={channels: [8, 16], norm_groups: 4, layers_per_block: 1}", *SHORT),
        *stage("encode_latents", "pool.actors=1"),
        *stage("train_diffusion", UNET, *SHORT, "cluster.cpus_per_rank=1"),
        *stage("generate", "generate.sampler.steps=2"),
    ]


def emoji_upscale(folder: Path) -> list[str]:
    return [
        *stage("train_autoencoder", "autoencoder={channels: [8, 8], norm_groups: 4}", *SHORT),
        *stage("encode_latents", "pool.actors=1"),
        *stage("train_diffusion", UNET, *SHORT),
        *stage("upscale", "upscale.sampler.steps=1", "pool.actors=1"),
    ]


def medical_chain(*imports: str) -> list[str]:
    """What all of them have, behind their imports."""
    classifier = ["classifier={channels: [8]}", "augment.shift=1", *SHORT[:2], ONE]
    judged = [f"evaluate.{said}" for said in ("samples=4", "feature_size=32", "group_examples=2", "bootstraps=20")]
    return [
        *imports,
        *stage("train_autoencoder", "autoencoder={channels: [8, 16], norm_groups: 4}", *SHORT),
        *stage("encode_latents", "pool.actors=1"),
        *stage("train_diffusion", UNET, *SHORT),
        *stage("generate", "generate.samples=24", "generate.shard_size=8", "generate.sampler.steps=2", "pool.actors=1"),
        *(word for arm in ("real", "oversampled", "synthetic") for word in stage(f"classifier_{arm}", *classifier)),
        *(word for name in ("evaluate_id", "evaluate_ood") for word in stage(name, *judged)),
    ]


def camelyon17(folder: Path) -> list[str]:
    medical.write_camelyon17(folder / "files", patches=6)
    both = {"path": "camelyon17_v1.0", "unlabelled": "camelyon17_unlabeled_v1.0"}
    small = ["data.source.image_size=32", "data.shard_size=16"]
    places = [f"data.source.{name}={folder}/files/{place}" for name, place in both.items()]
    return medical_chain(*stage("import_data", *places, *small))


def chexpert(folder: Path) -> list[str]:
    medical.write_chexpert(folder / "files", patients=60)
    medical.write_chestxray14(folder / "files" / "nih")
    small = ["data.source.image_size=32", "data.shard_size=16"]
    ours = [
        f"data.source.path={folder}/files/CheXpert-v1.0-small",
        f"data.source.demographics={folder}/files/CHEXPERT DEMO.csv",
    ]
    return medical_chain(
        *stage("import_chexpert", *ours, "data.fractions={train: 0.8, id_test: 0.2}", *small),
        *stage("import_chestxray14", f"data.source.path={folder}/files/nih", *small),
    )


def dermatology(folder: Path) -> list[str]:
    medical.write_dermatology(folder / "files")
    small = ["data.source.image_size=32", "data.shard_size=16", "data.fractions={train: 0.7, id_test: 0.3}"]
    return medical_chain(*stage("import_data", f"data.source.path={folder}/files", *small))


MEDICAL = [camelyon17, chexpert, dermatology]
CHAINS = [cifar10, imagenet256, stable_diffusion, emoji, emoji_gpu, emoji_upscale, *MEDICAL]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shrunk", CHAINS, ids=lambda f: f.__name__)
def test_a_large_chain_in_small(shrunk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_images(tmp_path / "images", 32)
    pipelines.write(tmp_path / "models")
    config = ROOT / "configs" / f"{shrunk.__name__}.yaml"
    words = [str(config), f"root={tmp_path}/root", *shrunk(tmp_path)]
    done = run("rayproj", "chain", *words, timeout=900)
    assert done.returncode == 0, done.stderr
    dataset = Dataset.open(f"{tmp_path}/root/{'large' if shrunk is emoji_upscale else 'synthetic'}")
    images = Reader(dataset, ["image"]).gather(np.arange(dataset.header.num_samples))["image"]
    assert len(images) >= 4 and images.std() > 1
    planned = run("rayproj", "plan", "chain", *words)
    assert planned.returncode == 0 and "parameters" in planned.stdout, planned.stderr


@pytest.mark.parametrize("config", MEDICAL, ids=lambda f: f.__name__)
def test_a_medical_chain_is_planned_before_there_are_files(config) -> None:  # type: ignore[no-untyped-def]
    assumed = ["--samples", "200000", "--shape", "3x32x32", "--classes", "2"]
    planned = run("rayproj", "plan", "chain", str(ROOT / "configs" / f"{config.__name__}.yaml"), *assumed)
    assert planned.returncode == 0 and "parameters" in planned.stdout, planned.stderr


def test_the_fairness_study_in_small(tmp_path: Path) -> None:
    """One model, two arms and two seeds; where α is 0, the classifier is the baseline's, bit for bit."""
    root, classifier = f"root={tmp_path}/root", ["train.train.steps=4", "evaluate.evaluate.group_examples=5"]
    images = f"{tmp_path}/root/models/pool=95/synthetic"
    place = f"{tmp_path}/root/data"
    tests = [f"evaluate.evaluate.test={place}/noto", f"evaluate.evaluate.tests={{openmoji: {place}/openmoji}}"]
    seeds = "train.run.seed: [0, 1]"
    arms = f'{{arm: {{heuristic: [], both: ["train.mix={{{images}/both: 0.5}}"]}}, {seeds}}}'
    none = f'{{arm: {{both: ["train.mix={{{images}/both: 0}}"]}}, alpha: {{0: []}}, {seeds}}}'
    grid = f'template: configs/fairness/point.yaml, set: ["train.data={place}/train_95"]'
    drawn = [
        f"{name}.generate.{k}" for name in ("label", "both") for k in ("samples=24", "shard_size=12", "sampler.steps=2")
    ]
    model = ["diffusion.train.steps=3", "filtered.curate.rules.copied.at_least=0", *drawn]
    pools = f'{{pool: {{95: ["encode.images={{pool: {place}/pool_95}}"]}}}}'
    words = [
        root,
        *stage("train_autoencoder", "autoencoder={channels: [8, 16, 16], norm_groups: 4, latent_channels: 4}", *SHORT),
        *stage("judge", "train.steps=4"),
        *stage("base", "train.steps=4"),
        *stage("models", f"sweep.set={model}", f"sweep.grids.models.axes={pools}"),
        *(word for w in "14" for word in stage(f"guidance_{w}", "generate.samples=12", "generate.sampler.steps=2")),
        *stage("points", f"sweep.set={[*classifier, *tests]}"),
        f"points.sweep.grids={{arms: {{{grid}, axes: {arms}}}, alpha: {{{grid}, axes: {none}}}}}",
        *stage(
            "report",
            "study.controls.no_better={both: both}",
            f"study.filters={{'95': {tmp_path}/root/models/pool=95/filtered}}",
        ),
        *stage("report", f"study.tests={{noto: {place}/noto, openmoji: {place}/openmoji}}", "study.bootstraps=50"),
        *stage("report", f"study.shown={{real: {place}/train_95, both: {images}/both}}"),
    ]
    done = run("rayproj", "chain", str(ROOT / "configs" / "fairness_study.yaml"), *words, timeout=560)
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "root" / "study.json").read_text())
    assert study["tests"]["noto"]["images"] == study["tests"]["openmoji"]["images"] == 248 and study["seeds"] == 2
    same = study["controls"][0]
    assert same["held"] and same["numbers"]["of"] == 2, same
    assert set(study["filters"]["95"]["cells"]) == {f"{g} × {t}" for g in ("female", "male") for t in ("light", "dark")}
    drawn_cells = cells_of([Dataset.open(f"{images}/both")], ["label", "tone"])
    assert drawn_cells.counts.tolist() == [6] * 4, "exact quotas"
    assert "data:image/png" in (tmp_path / "root" / "study.html").read_text()
