"""The images of a study, prepared before its first rating: each encoded anew under a name that tells nothing.

study.json         the plan
decisions.jsonl    what the policy said of each prompt
secret             what ids are made with (`rayproj.preferences.tokens`)
images/<id>.png    one image of each prompt and model, and the reference photos

The datasets and prompt files are read until everything is here; from then on the study needs them no more.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.data.encodings import to_picture
from rayproj.data.parts import hashed
from rayproj.data.prompts import Prompt
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.preferences.plan import Plan, Question, open_plan
from rayproj.preferences.study import StudyConfig, decisions_of, plan
from rayproj.preferences.tokens import REFERENCE, Seal
from rayproj.responsibility.policy import DECISIONS, records
from rayproj.responsibility.safety import Safety, SafetyConfig
from rayproj.storage.store import Store, to_json

TEXTS = ("prompt", "caption")  # fields that may hold the prompt of an image


def prepare(config: StudyConfig, store: Store, seed: int) -> Plan:
    """Fix the plan and copy the images that are not there yet.

    Raises:
        UserError: a model has no image of some prompt, images are of different sizes, prompts cannot be read or may not be
            shown, or a dataset from which images are wanted is not the one that the study began with.
    """
    references = {name: one.references for name, one in config.sets.items() if Question.detailed in one.questions}
    uris = {**config.models, **{REFERENCE + name: uri for name, uri in references.items()}}
    if begun := store.exists("study.json"):
        made = open_plan(store)
    else:
        store.write(DECISIONS, records(decisions_of(config)))
        made = plan(config, _hashes(config.models), seed, _hashes(references))
    seal, there = Seal.of(store), set(store.list("images") if begun else [])
    missing = {
        name: lacking
        for name, texts in _shown(made).items()
        if (lacking := {text for text in texts if seal.image(name, text) not in there})
    }
    if begun:
        _require_same(made, {name: uris[name] for name in missing})
    found = {name: _find(uris[name], texts, seed) for name, texts in missing.items()}
    models = [Dataset.open(uris[name]) for name in missing if name in config.models]
    shapes = {dataset.header.fields["image"].shape[1:] for dataset in models}
    if len(shapes) > 1 and not config.size:
        sizes = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise UserError(
            f"The models' images have different sizes ({sizes}), which would tell them apart; set study.size."
        )
    if not begun and config.safety.rules:
        made = _sifted(made, {name: _withheld(uris[name], of, config.safety) for name, of in found.items()})
    if not store.put_once("study.json", to_json(made.to_dict())):
        made = open_plan(store)  # another driver's, of the same config
    shown = _shown(made)
    for name, of in found.items():
        size = config.size if name in config.models else []
        for text, data in _encoded(uris[name], {text: i for text, i in of.items() if text in shown[name]}, size):
            store.put_once(seal.image(name, text), data)
    return made


def _hashes(uris: Mapping[str, str]) -> dict[str, str]:
    return {name: Dataset.open(uri).manifest_hash() for name, uri in uris.items()}


def _shown(made: Plan) -> dict[str, set[str]]:
    """The prompts of which an image is shown: of each model, and of the photos of each set that has such."""
    texts = {name: {prompt.text for prompt in prompts} for name, prompts in made.sets.items()}
    photos = {c.set for c in made.comparisons if c.question is Question.detailed}
    return {
        **{name: set().union(*texts.values()) for name in made.models},
        **{REFERENCE + name: texts[name] for name in made.sets if name in photos},
    }


def _require_same(made: Plan, uris: Mapping[str, str]) -> None:
    """That images still come from where those that are there came from.

    Raises:
        UserError: a dataset is another one by now.
    """
    then = made.models | {REFERENCE + name: of for name, of in made.references.items()}
    for name, now in _hashes(uris).items():
        if then.get(name, now) != now:  # plans of before did not keep the photos'
            raise UserError(
                f"Images of the study are missing, and '{uris[name]}' is another dataset than it began with; put that one "
                "back, or begin a study anew in another run.dir."
            )


def _withheld(uri: str, samples: Mapping[str, int], rules: SafetyConfig) -> set[str]:
    """The texts whose image does not pass the rules."""
    safety, found = Safety(rules), set[str]()
    for texts, images in _images(uri, samples):
        found |= {text for text, why in zip(texts, safety.reasons(images), strict=True) if why}
    return found


def _sifted(made: Plan, withheld: Mapping[str, set[str]]) -> Plan:
    """A plan without the prompts one of whose images may not be shown: of all models, so that each is compared on the same.

    Args:
        withheld: of each name of `_shown`, the texts of such images.

    Raises:
        UserError: of a set none is left.
    """
    of_models, sets = set[str]().union(*(withheld[name] for name in made.models)), dict[str, tuple[Prompt, ...]]()
    for name, prompts in made.sets.items():
        out = of_models | withheld.get(REFERENCE + name, set())
        sets[name] = tuple(prompt for prompt in prompts if prompt.text not in out)
        if not sets[name]:
            raise UserError(
                f"Of every prompt of the set '{name}' some image does not pass study.safety.rules; loosen them, or leave "
                "the set or the model out."
            )
    left_out = {name: n for name, prompts in made.sets.items() if (n := len(prompts) - len(sets[name]))}
    return replace(made, sets=sets, left_out=left_out)


def _find(uri: str, texts: Collection[str], seed: int) -> dict[str, int]:
    """The sample of each text; of several one by a keyed draw."""
    dataset = Dataset.open(uri)
    field = next((name for name in TEXTS if name in dataset.header.fields), None)
    if field is None or "image" not in dataset.header.fields:
        raise UserError(f"'{uri}' has no images with a field 'prompt' or 'caption'; give a dataset that has.")
    dataset.manifest_hash()  # raises where shards are missing
    found, reader = defaultdict(list), Reader(dataset, [field])
    for shard in range(dataset.header.num_shards):
        written = reader.shard(shard)[field]
        for index, text in zip(dataset.header.shard_range(shard), written, strict=True):
            found[" ".join(str(text).split())].append(index)
    if lacking := sorted(set(texts) - set(found)):
        raise UserError(
            f"'{uri}' has no image of {len(lacking)} of {len(texts)} prompts, such as '{lacking[0]}'; generate them, or "
            "leave these prompts out."
        )
    return {text: min(found[text], key=lambda index: hashed("image", f"{text}/{index}", seed)) for text in texts}


def _encoded(uri: str, samples: dict[str, int], size: list[int]) -> Iterator[tuple[str, bytes]]:
    """Text and PNG of each sample, as they lie in the dataset. All are RGB, so that no channel tells anything."""

    def encode(image: np.ndarray) -> bytes:
        picture, buffer = to_picture(image).convert("RGB"), io.BytesIO()
        if size and picture.size != (size[1], size[0]):
            picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        picture.save(buffer, "png")
        return buffer.getvalue()

    with ThreadPoolExecutor() as threads:
        for texts, images in _images(uri, samples):
            yield from zip(texts, threads.map(encode, images), strict=True)


def _images(uri: str, samples: Mapping[str, int]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Texts and uint8 images [n, C, H, W] of samples, shard by shard as they lie in the dataset."""
    dataset = Dataset.open(uri)
    reader, by_shard = Reader(dataset, ["image"]), defaultdict[int, list[str]](list)
    places, _ = dataset.header.places(np.array(list(samples.values()), np.int64))
    for text, shard in zip(samples, places, strict=True):
        by_shard[int(shard)].append(text)
    for _, texts in sorted(by_shard.items()):
        yield texts, reader.gather(np.array([samples[text] for text in texts]))["image"]
