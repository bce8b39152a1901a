"""Images are prepared once, without anything that tells whose they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayproj.curation.scorers import RuleConfig, Scorer
from rayproj.data.encodings import decode_image
from rayproj.errors import UserError
from rayproj.preferences.images import prepare
from rayproj.preferences.plan import Question, open_plan
from rayproj.preferences.study import SetConfig, StudyConfig
from rayproj.preferences.tokens import REFERENCE, Seal
from rayproj.responsibility.policy import Blocked, PolicyConfig
from rayproj.responsibility.safety import SafetyConfig
from rayproj.storage.store import Store
from tests.support import drawn

PROMPTS = ["a cat", "a dog", "two cups", "a red car on a street", "a tree"]


def study(folder: Path, prompts: list[str] = PROMPTS, **changes: object) -> StudyConfig:
    for strength, name in enumerate("ab"):
        drawn.write(f"{folder}/{name}", strength, PROMPTS)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    sets = {"main": SetConfig(str(folder / "prompts.txt"), [Question.overall])}
    return StudyConfig(**{"models": {n: f"{folder}/{n}" for n in "ab"}, "sets": sets, "ratings": 10, **changes})  # type: ignore[arg-type]


def test_the_images_are_the_datasets_and_say_nothing_else(tmp_path: Path) -> None:
    store = Store(f"{tmp_path}/run")
    made = prepare(study(tmp_path), store, seed=0)
    assert open_plan(store) == made and len(store.list("images")) == 10
    seal = Seal.of(store)
    for strength, name in enumerate("ab"):
        for text in PROMPTS:
            data = store.read(seal.image(name, text))
            assert np.array_equal(decode_image(data), drawn.picture(strength, text))
            picture = Image.open(io.BytesIO(data))
            assert not picture.info and picture.mode == "RGB"
            chunks, place = [], 8
            while place < len(data):
                size = int.from_bytes(data[place : place + 4], "big")
                chunks.append(data[place + 4 : place + 8])
                place += size + 12
            assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}


def test_what_was_lost_is_made_again_and_then_nothing_else_is_needed(tmp_path: Path) -> None:
    config, store = study(tmp_path), Store(f"{tmp_path}/run")
    made = prepare(config, store, seed=0)
    before = {path: store.read(path) for path in store.list("images")}
    for path in list(before)[::3]:
        store.delete_tree(path)
    assert prepare(config, store, seed=0) == made
    assert {path: store.read(path) for path in store.list("images")} == before
    Store(str(tmp_path)).delete_tree("a")
    (tmp_path / "prompts.txt").unlink()
    assert prepare(config, store, seed=0) == made


def test_of_several_images_of_a_prompt_a_keyed_one_is_taken(tmp_path: Path) -> None:
    config = study(tmp_path)
    drawn.write(f"{tmp_path}/many", 2, PROMPTS, copies=5)
    config.models["many"] = f"{tmp_path}/many"
    prepare(config, Store(f"{tmp_path}/run"), seed=0)
    assert len(Store(f"{tmp_path}/run").list("images")) == 15


def test_a_prompt_that_a_model_lacks_is_named(tmp_path: Path) -> None:
    config = study(tmp_path, [*PROMPTS, "a hippopotamus"])
    with pytest.raises(UserError, match="no image of 1 of 6 prompts, such as 'a hippopotamus'"):
        prepare(config, Store(f"{tmp_path}/run"), seed=0)
    assert not Store(f"{tmp_path}/run").exists("study.json"), "nothing is fixed yet"


def test_sizes_that_tell_models_apart_are_refused_or_made_alike(tmp_path: Path) -> None:
    config = study(tmp_path)
    drawn.write(f"{tmp_path}/large", 2, PROMPTS, side=24)
    config.models["large"] = f"{tmp_path}/large"
    with pytest.raises(UserError, match=r"different sizes \(16x16, 24x24\)"):
        prepare(config, Store(f"{tmp_path}/run"), seed=0)
    config.size = [20, 20]
    store = Store(f"{tmp_path}/run")
    prepare(config, store, seed=0)
    assert {Image.open(io.BytesIO(store.read(path))).size for path in store.list("images")} == {(20, 20)}


def test_reference_photos_are_found_by_their_caption(tmp_path: Path) -> None:
    config = study(tmp_path)
    drawn.write(f"{tmp_path}/photos", 5, PROMPTS, side=32, field="caption")
    config.sets["photos"] = SetConfig(str(tmp_path / "prompts.txt"), [Question.detailed], f"{tmp_path}/photos")
    store = Store(f"{tmp_path}/run")
    prepare(config, store, seed=0)
    photo = decode_image(store.read(Seal.of(store).image(REFERENCE + "photos", "a cat")))
    assert np.array_equal(photo, drawn.picture(5, "a cat", 32))


def test_latents_are_refused_and_a_study_that_is_not_there_is_said(tmp_path: Path) -> None:
    config = study(tmp_path)
    drawn.write(f"{tmp_path}/odd", 1, PROMPTS, field="title")
    config.models["b"] = f"{tmp_path}/odd"
    with pytest.raises(UserError, match="no images with a field 'prompt'"):
        prepare(config, Store(f"{tmp_path}/run"), seed=0)
    with pytest.raises(UserError, match="There is no study"):
        open_plan(Store(f"{tmp_path}/none"))


def test_what_does_not_pass_the_rules_is_left_out_for_all_models_before_anything_is_planned(tmp_path: Path) -> None:
    rules = SafetyConfig({"blank": RuleConfig(Scorer.contrast, at_least=5.0)})
    config, store = study(tmp_path, safety=rules), Store(f"{tmp_path}/run")
    drawn.write(f"{tmp_path}/sometimes", 3, PROMPTS, blank=["a dog"])
    drawn.write(f"{tmp_path}/photos", 3, PROMPTS, field="caption", blank=["a tree"])
    config.models["sometimes"] = f"{tmp_path}/sometimes"
    config.sets["photos"] = SetConfig(str(tmp_path / "prompts.txt"), [Question.detailed], f"{tmp_path}/photos")
    made = prepare(config, store, seed=0)
    left = {name: [prompt.text for prompt in prompts] for name, prompts in made.sets.items()}
    assert left["main"] == [text for text in PROMPTS if text != "a dog"]
    assert left["photos"] == [text for text in left["main"] if text != "a tree"]
    assert made.left_out == {"main": 1, "photos": 2} and open_plan(store) == made
    assert {made.task(slot).prompt.text for slot in range(made.slots)} == {*left["main"]}
    seal = Seal.of(store)
    shown = {seal.image(name, text) for name in config.models for text in left["main"]}
    assert {*store.list("images")} == shown | {seal.image(REFERENCE + "photos", text) for text in left["photos"]}
    assert prepare(config, store, seed=0) == made, "and it stays so"
    store.delete_tree("study.json")
    assert prepare(config, store, seed=0) == made, "whatever is there"
    drawn.write(f"{tmp_path}/never", 3, PROMPTS, blank=PROMPTS)
    config.models["never"] = f"{tmp_path}/never"
    with pytest.raises(UserError, match=r"Of every prompt of the set 'main' some image does not pass study\.safety"):
        prepare(config, Store(f"{tmp_path}/other"), seed=0)


def test_the_policy_is_asked_for_the_prompts_and_its_decisions_are_kept(tmp_path: Path) -> None:
    config, store = study(tmp_path, [*PROMPTS, "a nude person", "a tree for a@b.org"]), Store(f"{tmp_path}/run")
    with pytest.raises(
        UserError, match=r"blocks 2 of 7 prompts: 'a nude person' \(sexual.*study\.policy\.blocked=drop"
    ):
        prepare(config, store, seed=0)
    assert not store.exists("study.json") and len(store.read("decisions.jsonl").splitlines()) == 7
    config.policy = PolicyConfig(blocked=Blocked.drop)
    assert [prompt.text for prompt in prepare(config, store, seed=0).sets["main"]] == PROMPTS


def test_a_prompt_that_the_policy_rewrites_is_shown_and_looked_for_as_it_is_then(tmp_path: Path) -> None:
    config = study(tmp_path, ["a cat for a@b.org", "a cat for", "a dog"], policy=PolicyConfig(rewrite=True))
    for strength, name in enumerate("ab"):
        drawn.write(f"{tmp_path}/{name}2", strength, ["a cat for", "a dog"])
        config.models[name] = f"{tmp_path}/{name}2"
    made = prepare(config, Store(f"{tmp_path}/run"), seed=0)
    assert [prompt.text for prompt in made.sets["main"]] == ["a cat for", "a dog"], "each once"


def test_images_are_not_made_up_for_from_another_dataset(tmp_path: Path) -> None:
    config, store = study(tmp_path), Store(f"{tmp_path}/run")
    drawn.write(f"{tmp_path}/photos", 5, PROMPTS, field="caption")
    config.sets["photos"] = SetConfig(str(tmp_path / "prompts.txt"), [Question.detailed], f"{tmp_path}/photos")
    made, seal = prepare(config, store, seed=0), Seal.of(store)
    for name, of, field in (("a", "a", "prompt"), ("photos", f"{REFERENCE}photos", "caption")):
        Store(str(tmp_path)).delete_tree(name)
        drawn.write(f"{tmp_path}/{name}", 6, PROMPTS, field=field)
        assert prepare(config, store, seed=0) == made, "nothing is missing"
        kept = store.read(seal.image(of, "a cat"))
        store.delete_tree(seal.image(of, "a cat"))
        with pytest.raises(UserError, match=f"missing, and '{tmp_path}/{name}' is another dataset than it began with"):
            prepare(config, store, seed=0)
        store.write(seal.image(of, "a cat"), kept)
