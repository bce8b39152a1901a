"""What draws images: a model of ours, a pipeline of diffusers, real images. An image depends on its number and its slice."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayproj import keyed
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.discovery.generators import Asked, Generator, GeneratorConfig, in_turn, open_generator
from rayproj.discovery.slices import Slice, Term
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.export import pipeline as export
from tests.support import pipelines, runs
from tests.support.ranks import run_ranks

LABELS = {"cat": "a cat", "dog": "a dog"}
FEW = SamplerConfig(steps=2, guidance=2.0)
CAT, DOG = Slice("cat"), Slice("dog")
RED = Slice.of("cat", [Term("style", "flat"), Term("colour", "in red"), Term("", "on grass")])


def write_images(uri: str, count: int = 48) -> Dataset:
    """Of two classes, with captions, a style and an owner; the pixels say the row."""
    fields = {"image": Field("png", (3, 8, 8)), "label": Field("int")}
    fields |= dict.fromkeys(("caption", "style", "owner"), Field("str"))
    dataset = Dataset.create(uri, Header("pets", fields, count, 16, ("cat", "dog")))
    for shard in range(dataset.header.num_shards):
        samples = [
            {
                "key": f"{i:08d}", "image": np.full((3, 8, 8), i, np.uint8), "label": i % 2, "owner": f"owner {i // 4}",
                "caption": f"a {('cat', 'dog')[i % 2]} on {('grass', 'sand')[i // 2 % 2]}",
                "style": ("flat", "round")[i // 3 % 2],
            }
            for i in dataset.header.shard_range(shard)
        ]  # fmt: skip
        commit_shard(dataset, shard, samples, "test", 0.0)
    return dataset


def draw(generator: Generator, slices: list[Slice], ids: list[int], rows: list[int] | None = None) -> dict[str, Any]:
    return generator.draw(Asked(slices, np.array(ids), np.array(rows or [-1] * len(ids))))


def test_real_images_are_taken_once_and_confirmed_by_others(tmp_path: Path) -> None:
    images = write_images(str(tmp_path / "images"), 96)
    config = GeneratorConfig(images=images.uri, group="owner")
    generator = open_generator(config, LABELS, {"style": []}, 0, "cpu")
    assert generator.values("style", []) == ["flat", "round"] and generator.shape == (3, 8, 8)
    flat, grass = Slice.of("cat", [Term("style", "flat")]), Slice.of("cat", [Term("", "grass")])
    both = Slice.of("cat", [*flat.terms, *grass.terms])
    first = generator.choose([(CAT, 3), (flat, 2), (both, 100)], False, set())
    assert [len(rows) for rows in first][:2] == [3, 2] and 0 < len(first[2]) < 12
    used = [row for rows in first for row in rows]
    assert len(set(used)) == len(used)
    again = generator.choose([(CAT, 100)], False, set(used))[0]
    confirmed = generator.choose([(CAT, 100), (flat, 100), (grass, 100)], True, set(used))
    assert not set(again) & set(used) and not set(confirmed[0]) & {*confirmed[1], *confirmed[2]}
    everything = set(used) | set(again)
    for rows in confirmed:
        assert not {row // 4 for row in rows} & {row // 4 for row in everything}, "owners are not torn apart"
    assert everything | {row for rows in confirmed for row in rows} <= {i for i in range(96) if i % 2 == 0}
    shared, apart = (generator.choose([(flat, 5), (grass, 100)], True, set(used), once) for once in (False, True))
    assert shared[0] == apart[0] and set(shared[0]) & set(shared[1]) and not set(apart[0]) & set(apart[1])
    columns = draw(generator, [flat] * 2, [0, 1], first[1])
    assert columns["image"][:, 0, 0, 0].tolist() == first[1] and set(columns["style"]) == {"flat"}
    found = generator.terms(columns, [flat] * 2)
    assert all(Term("style", "flat") in terms and Term("", "cat") not in terms for terms in found)
    everyone = generator.choose([(CAT, 100)], False, set())[0]
    assert sorted(generator.choose([(both, 100)], False, set())[0]) == [
        row for row in sorted(everyone) if row // 2 % 2 == 0 and row // 3 % 2 == 0
    ]


def test_groups_take_turns() -> None:
    assert in_turn(list("aababc"), [10, 11, 12, 13, 14, 15]) == [10, 12, 15, 11, 14, 13]
    assert in_turn([], []) == []


def test_a_pipeline_draws_by_prompt_whatever_is_beside_it(tmp_path: Path) -> None:
    pipelines.write(tmp_path / "pipeline")
    config = GeneratorConfig(pipeline=str(tmp_path / "pipeline"), size=[16, 16], sampler=FEW)
    generator = open_generator(config, LABELS, {"style": ["flat"]}, 0, "cpu")
    found = draw(generator, [CAT, RED, DOG], [5, 6, 7])
    assert found["image"].shape == (3, 3, 16, 16) and found["image"].dtype == np.uint8
    assert list(found["prompt"]) == ["a cat", "a cat, in red, flat, on grass", "a dog"]
    alone = draw(generator, [RED], [6])["image"][0]
    assert np.abs(alone.astype(int) - found["image"][1]).max() <= 1
    assert not np.array_equal(draw(generator, [RED], [7])["image"][0], alone), "another seed"
    assert generator.choose([(CAT, 2), (RED, 1)], False, set()) == [[-1, -1], [-1]]
    wrong = open_generator(
        GeneratorConfig(pipeline=str(tmp_path / "pipeline"), size=[8, 8], sampler=FEW), LABELS, {}, 0, "cpu"
    )
    drawn = draw(wrong, [CAT], [0])["image"]
    assert drawn.shape == (1, 3, 8, 8), "a pipeline that takes a size draws it"
    with pytest.raises(UserError, match="is no folder of a diffusers pipeline"):
        open_generator(GeneratorConfig(pipeline=str(tmp_path), size=[8, 8]), LABELS, {}, 0, "cpu")


def test_a_pipeline_of_class_labels_draws_their_numbers_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    theirs = pipelines.write_dit(folder, {207: "dog, hound", 3: "cat"})
    config = GeneratorConfig(pipeline=str(folder), size=[8, 8], sampler=FEW)
    generator = open_generator(config, LABELS, {}, 0, "cpu")
    assert not generator.takes_words
    found = draw(generator, [CAT, DOG, CAT], [5, 5, 6])
    assert found["image"].shape == (3, 3, 8, 8) and list(found["prompt"]) == ["cat", "dog", "cat"]
    row = torch.tensor([[5, 0, 0]])
    seed = int((keyed.uniform(0, "pipeline", row).double() * 2**52).long())
    for number, image in ((3, found["image"][0]), (207, found["image"][1])):
        direct = theirs([number], 2.0, torch.Generator().manual_seed(seed), 2).images[0]
        assert np.abs(np.moveaxis(np.asarray(direct).astype(int), -1, 0) - image).max() <= 1
    assert open_generator(config, {"hound": "a hound"}, {}, 0, "cpu").numbers["hound"] == 207  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"knows no class 'eel'; name the labels .*: dog, hound, cat"):
        open_generator(config, {"eel": "an eel"}, {}, 0, "cpu")
    with pytest.raises(UserError, match=r"discover.attributes.style: the pipeline '.*' takes class labels alone; give"):
        open_generator(config, LABELS, {"style": ["flat"]}, 0, "cpu")


def test_a_pipelines_class_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    config = GeneratorConfig(pipeline=str(tmp_path), size=[8, 8])
    for name, says in (
        ("NoSuchPipeline", "is a NoSuchPipeline, which this diffusers lacks"),
        ("DanceDiffusionPipeline", "takes neither a prompt nor class labels"),
        (["pipeline", "Own"], "say discover.generator.trust_code=true"),
    ):
        index.write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UserError, match=says):
            open_generator(config, LABELS, {}, 0, "cpu")
    (tmp_path / "pipeline.py").write_text(inspect.getsource(export))
    index.write_text(json.dumps({
        "_class_name": ["pipeline", "ClassToImagePipeline"], "id2label": {"0": "cat", "1": "dog"}
    }))  # fmt: skip
    trusted = dataclasses.replace(config, trust_code=True)
    assert not open_generator(trusted, LABELS, {}, 0, "cpu").takes_words
    with pytest.raises(UserError, match=r"say discover\.generator\.trust_code=true"):
        open_generator(config, LABELS, {}, 0, "cpu")


def test_weights_of_either_kind_are_in_the_digest_of_a_pipeline(tmp_path: Path) -> None:
    pipelines.write_dit(tmp_path, {3: "cat", 4: "dog"})
    config, digests = GeneratorConfig(pipeline=str(tmp_path), size=[8, 8]), set[str]()
    for name in ("", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if name:
            (tmp_path / "transformer" / name).write_bytes(b"other weights")
        digests.add(open_generator(config, LABELS, {}, 0, "cpu").said["pipeline_digest"])
    assert len(digests) == 3


def train_models(world: World, folder: str) -> None:
    images = write_images(f"{folder}/images")
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, {"channels": [8, 8], "norm_groups": 4})
    styles = {"style": ["flat", "round"]}
    latents = runs.latents(f"{folder}/latents", images, autoencoder, {"captions": ["caption"], "tokens": 8}, styles)
    network = {"channels": [16, 32], "head_dim": 16, "norm_groups": 8, "layers_per_block": 1}
    by_text = {"style": {"dropout": 0.1}, "text": {"dropout": 0.1, "captions": {"caption": 1.0}}}
    runs.denoiser(world, f"{folder}/by_text", latents, {"denoiser": network, "conditions": by_text})
    by_label = {"style": {"dropout": 0.1}, "label": {"dropout": 0.1}}
    runs.denoiser(world, f"{folder}/by_label", latents, {"denoiser": network, "conditions": by_label}, lr=0.1)


def test_models_of_ours_draw_by_text_labels_and_properties(tmp_path: Path) -> None:
    run_ranks(train_models, 1, str(tmp_path))
    attributes = {"style": ["flat", "round"], "colour": ["in red"]}
    by_text = open_generator(
        GeneratorConfig(model=str(tmp_path / "by_text"), sampler=FEW), LABELS, attributes, 3, "cpu"
    )
    assert by_text.values("style", []) == ["flat", "round"] and by_text.said["model_commit"]
    found = draw(by_text, [CAT, RED, DOG], [5, 6, 7])
    assert found["image"].shape == (3, 3, 8, 8)
    assert list(found["prompt"]) == ["a cat", "a cat, in red, on grass", "a dog"], "the style is a property"
    alone = draw(by_text, [RED], [6])
    assert np.abs(alone["image"][0].astype(int) - found["image"][1]).max() <= 1
    model = by_text.model  # type: ignore[attr-defined]
    condition = {"style": torch.tensor([0]), "text": model.text(["a cat, in red, on grass"])}
    direct = model.draw(condition, torch.tensor([6]), 3, FEW)
    assert np.array_equal(direct.numpy(), alone["image"])

    by_label = GeneratorConfig(model=str(tmp_path / "by_label"), sampler=FEW)
    generator = open_generator(by_label, LABELS, {"style": []}, 3, "cpu")
    flat, round_ = (Slice.of("dog", [Term("style", value)]) for value in ("flat", "round"))
    images = draw(generator, [flat, round_, flat], [1, 1, 1])["image"].astype(int)
    assert np.abs(images[0] - images[2]).max() <= 1 < np.abs(images[0] - images[1]).max()
    for labels, attributes, says in (
        ({"eel": "an eel"}, {}, "cannot draw 'eel'; it knows cat, dog"),
        (LABELS, {"colour": ["red"]}, "has no such property and takes no text; its properties are style"),
        (LABELS, {"style": ["oil"]}, "is nothing this model knows"),
    ):
        with pytest.raises(UserError, match=says):
            open_generator(by_label, labels, attributes, 3, "cpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="list the values"):
        by_text.values("colour", [])
    with pytest.raises(UserError, match="There is no run at"):
        open_generator(GeneratorConfig(model=str(tmp_path / "none")), LABELS, {}, 0, "cpu")
