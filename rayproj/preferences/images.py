"""The images of a study, prepared before its first rating: each encoded anew under a name that tells nothing.

study.json         the plan
secret             what ids are made with (`rayproj.preferences.tokens`)
images/<id>.png    one image of each prompt and model, and the reference photos

The datasets and prompt files are read until everything is here; from then on the study needs them no more.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.data.encodings import to_picture
from rayproj.data.parts import hashed
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.preferences.plan import Plan, Question, StudyConfig, plan
from rayproj.preferences.tokens import Seal
from rayproj.storage.store import Store, from_json, to_json

REFERENCE = "/"  # before the name of a set stands for its photos; no model has such a name
TEXTS = ("prompt", "caption")  # fields that may hold the prompt of an image


def open_plan(store: Store) -> Plan:
    """The plan of a study.

    Raises:
        UserError: there is none.
    """
    try:
        return Plan.from_dict(from_json(store.read("study.json")))
    except FileNotFoundError:
        raise UserError(f"There is no study at '{store.uri}'; start jobs/serve_study.py once.") from None


def prepare(config: StudyConfig, store: Store, seed: int) -> Plan:
    """Fix the plan and copy the images that are not there yet.

    Raises:
        UserError: a model has no image of some prompt, images are of different sizes, or prompts cannot be read.
    """
    if store.exists("study.json"):
        made = open_plan(store)
    else:
        made = plan(config, {name: Dataset.open(uri).manifest_hash() for name, uri in config.models.items()}, seed)
    seal, there = Seal.of(store), set(store.list("images"))
    texts = {prompt.text for prompts in made.sets.values() for prompt in prompts}
    wanted = {name: (uri, texts) for name, uri in config.models.items()}
    for name, one in config.sets.items():
        if Question.detailed in one.questions:
            wanted[REFERENCE + name] = (one.references, {prompt.text for prompt in made.sets[name]})
    missing = {
        name: (uri, lacking)
        for name, (uri, of) in wanted.items()
        if (lacking := {text for text in of if seal.image(name, text) not in there})
    }
    found = {name: _find(uri, of, seed) for name, (uri, of) in missing.items()}
    models = [Dataset.open(uri) for name, (uri, _) in missing.items() if name in config.models]
    shapes = {dataset.header.fields["image"].shape[1:] for dataset in models}
    if len(shapes) > 1 and not config.size:
        sizes = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise UserError(
            f"The models' images have different sizes ({sizes}), which would tell them apart; set study.size."
        )
    if not store.put_once("study.json", to_json(made.to_dict())):
        made = open_plan(store)  # another driver's, of the same config
    for name, (uri, _) in missing.items():
        size = config.size if name in config.models else []
        for text, data in _encoded(uri, found[name], size):
            store.put_once(seal.image(name, text), data)
    return made


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
    dataset = Dataset.open(uri)
    reader = Reader(dataset, ["image"])

    def encode(image: np.ndarray) -> bytes:
        picture, buffer = to_picture(image).convert("RGB"), io.BytesIO()
        if size and picture.size != (size[1], size[0]):
            picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        picture.save(buffer, "png")
        return buffer.getvalue()

    by_shard = defaultdict(list)
    places, _ = dataset.header.places(np.array(list(samples.values()), np.int64))
    for text, shard in zip(samples, places, strict=True):
        by_shard[int(shard)].append(text)
    with ThreadPoolExecutor() as threads:
        for _, texts in sorted(by_shard.items()):
            images = reader.gather(np.array([samples[text] for text in texts]))["image"]
            yield from zip(texts, threads.map(encode, images), strict=True)
