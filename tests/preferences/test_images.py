"""Images are prepared once, without anything that tells whose they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayproj.data.encodings import decode_image
from rayproj.errors import UserError
from rayproj.preferences.images import REFERENCE, open_plan, prepare
from rayproj.preferences.plan import Question, SetConfig, StudyConfig
from rayproj.preferences.tokens import Seal
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
