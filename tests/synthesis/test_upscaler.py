"""Larger images of smaller ones: from the cached copies to the shards of jobs/upscale.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayproj.curation.scorers import RuleConfig, Scorer, scorer
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.engine.checkpoint import commits
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.watermark import WatermarkConfig, key_name, mark
from rayproj.responsibility.provenance import ProvenanceConfig, Signer, check, write_keys
from rayproj.responsibility.safety import SafetyConfig, described
from rayproj.storage.store import Store, to_json
from rayproj.synthesis.gate import withheld
from rayproj.synthesis.plan import GenerateConfig, commit_hash
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
    maker = Upscaler({"out": config.out, "batch": 4, "key": ""}, "cpu")
    samples = maker.make(1)
    small = Reader(Dataset.open(config.images)).gather(np.arange(6, 12))
    assert [s["label"] for s in samples] == small["label"].tolist() and samples[0]["seed"] == 7
    again = Upscaler({"out": config.out, "batch": 1, "key": ""}, "cpu").make(1)
    for one, same in zip(again, samples, strict=True):
        assert one["image"].shape == (3, 16, 16)
        assert np.abs(one["image"].astype(int) - same["image"]).max() <= 1, "whatever the batch"
    given = {name: column[:1] for name, column in small.items()}
    drawn = maker._draw(np.array([6]), given)
    assert not np.array_equal(drawn, maker._draw(np.array([6]), {**given, "image": 255 - given["image"]}))
    assert not np.array_equal(drawn, maker._draw(np.array([6]), {**given, "label": 1 - given["label"]}))


def test_larger_images_pass_the_rules_and_are_marked_again(folder: Path) -> None:
    key, other = folder / "key", folder / "other"
    key.write_bytes(b"k" * 32), other.write_bytes(b"o" * 32)
    plain = Upscaler({"out": str(folder / "large"), "batch": 6, "key": ""}, "cpu").make(0)
    contrast = [float(scorer(RuleConfig(Scorer.contrast), "cpu")({"image": s["image"][None]})[0]) for s in plain]
    rule = RuleConfig(Scorer.contrast, at_most=float(np.median(contrast)))
    small = {
        "watermark": {"key": "that of others", "strength": 9.0},
        "safety": described(SafetyConfig({"loud": rule}, 40)),
    }
    write_images(str(folder / "marked"), 8, private=None, **small)
    changes = {"images": str(folder / "marked"), "out": str(folder / "large_marked")}
    with pytest.raises(UserError, match=r"carry a watermark, which .* anew has not; give upscale\.watermark\.key"):
        plan(config_of(folder, **changes), 3)
    changes["watermark"] = WatermarkConfig(str(key), 30.0)
    header = plan(config_of(folder, **changes), 3)
    assert header.provenance["watermark"] == {"key": key_name(key.read_bytes()), "strength": 30.0}
    assert header.provenance["safety"] == small["safety"], "no rules of its own: those of the small images"
    Dataset.create(changes["out"], header)
    with pytest.raises(UserError, match="is not the one that"):
        Upscaler({"out": changes["out"], "batch": 6, "key": str(other)}, "cpu")
    made = Upscaler({"out": changes["out"], "batch": 6, "key": str(key)}, "cpu").make(0)
    unmarked = Upscaler({"out": changes["out"], "batch": 6, "key": str(key)}, "cpu")
    unmarked.gate.secret = b""
    drawn = unmarked.make(0)
    assert np.array_equal(
        mark(np.stack([s["image"] for s in drawn]), key.read_bytes(), 30.0), [s["image"] for s in made]
    )
    judge = scorer(rule, "cpu")
    assert (judge({"image": np.stack([s["image"] for s in drawn])}) <= rule.at_most).all()
    anew = [s["tries"] > 1 for s in made]
    assert any(anew) and not all(anew), "some passed at once"
    for one, before, again in zip(drawn, plain, anew, strict=True):
        assert np.array_equal(one["image"], before["image"]) != again
    recorded = withheld(Dataset.open(changes["out"]))
    assert recorded["images"] == sum(s["tries"] - 1 for s in made) == recorded["reasons"]["loud"]
    changes |= {"out": str(folder / "never"), "safety": SafetyConfig({"all": RuleConfig(Scorer.contrast, 999.0)}, 2)}
    Dataset.create(changes["out"], plan(config_of(folder, **changes), 3))
    with pytest.raises(UserError, match=r"none of 2 images passed upscale\.safety\.rules \(all\)"):
        Upscaler({"out": changes["out"], "batch": 6, "key": str(key)}, "cpu").make(0)


def test_what_made_a_signed_set_larger_is_stated_and_so_is_what_was_withheld(folder: Path) -> None:
    keys = write_keys(str(folder / "keys"))
    rules = SafetyConfig({"quiet": RuleConfig(Scorer.contrast, at_least=0.0)})
    config = config_of(folder, out=str(folder / "signed"), safety=rules)
    dataset = Dataset.create(config.out, plan(config, 3))
    maker = Upscaler({"out": config.out, "batch": 6, "key": ""}, "cpu")
    for shard in (0, 1):
        commit_shard(dataset, shard, maker.make(shard), "test", 0.1)
    Signer(ProvenanceConfig(str(keys[0]), str(keys[1]))).sign_dataset(dataset)
    found = check(config.out, str(keys[2]))
    assert found.sound and found.trusted
    run = Store(str(folder / "upscaler"))
    stated = {"upscaler": run.uri, "upscaler_commit": commit_hash(commits(run)[-1]), "upscaler_seed": 3}
    stated |= {"upscaled_from": Store(config.images).uri, "private": {"epsilon": 8.0}, "samples": 12}
    assert {name: found.facts[name] for name in stated} == stated
    dataset.store.write("withheld/000001.json", to_json({"images": 7, "reasons": {"quiet": 7}}))
    assert check(config.out, str(keys[2])).problems == ("withheld/000001.json was changed",)


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
