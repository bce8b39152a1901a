"""What draws the images of a slice: our own diffusion model, any pipeline of diffusers, or a dataset of real images."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rayproj import config as configuration
from rayproj import keyed
from rayproj.data.dataset import Dataset, Field
from rayproj.data.reader import Columns, Reader
from rayproj.data.split import assign
from rayproj.diffusion.conditions import LABEL, TEXT, Condition, Conditions
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig, TrainedModel
from rayproj.discovery.slices import Slice, Term, described
from rayproj.errors import UserError
from rayproj.responsibility.policy import PolicyConfig
from rayproj.storage.store import Store
from rayproj.synthesis.plan import GenerateConfig, commit_hash, plan

PROMPT, ROW, CLASS_LABELS = "prompt", "row", "class_labels"
AT_ONCE = 4096  # rows of a dataset whose attributes are read at once


@dataclass
class GeneratorConfig:
    """One of three: model, pipeline or images."""

    model: str = ""  # run dir of a diffusion model of ours; an attribute that it has as a property is drawn by that
    # Folder of a pipeline of diffusers that takes a prompt; one that takes class labels draws the labels as such, and no
    # attributes or words.
    pipeline: str = ""
    size: list[int] = field(default_factory=list)  # of a pipeline: height and width in pixels
    trust_code: bool = False  # run the code that comes in the pipeline's folder, such as that of `rayproj export`
    images: str = ""  # a dataset of real images with labels; no image is taken twice
    caption: str = "caption"  # of images: the field with descriptions, if there is one
    # Of images: a field of which equal values stay together, all for finding slices or all for confirming them, such as the
    # person or the figure that is shown. "": every image by itself.
    group: str = ""
    prompt: str = "{label}"  # of a label that `labels` gives none
    sampler: SamplerConfig = field(default_factory=SamplerConfig)  # of a pipeline, steps and guidance alone count

    def problems(self) -> list[str]:
        found = []
        if sum(map(bool, (self.model, self.pipeline, self.images))) != 1:
            found.append("discover.generator needs one of model, pipeline and images.")
        if self.pipeline and (len(self.size) != 2 or min(self.size) < 1):
            found.append("discover.generator.size is [height, width] of the pipeline's images.")
        return found


@dataclass(frozen=True)
class Asked:
    """What is to be drawn, on the way to a generator: the ids that key the randomness, and rows of a dataset."""

    slices: Sequence[Slice]
    ids: np.ndarray
    rows: np.ndarray


class Generator(Protocol):
    """Draws images of slices.

    Attributes:
        shape: [C, H, W] of an image.
        fields: further ones that come with each image.
        said: what a dataset's provenance says of it; equal where the same is drawn.
        captioned: whether its images come with descriptions.
        takes_words: whether images can be asked for by what their descriptions would say.
    """

    shape: tuple[int, ...]
    captioned: bool
    takes_words: bool
    fields: dict[str, Field]
    said: dict[str, Any]

    def values(self, attribute: str, given: Sequence[str]) -> list[str]:
        """The values of an attribute that are looked at: those given, or all that are known.

        Raises:
            UserError: it has no such attribute or value.
        """
        ...

    def terms(self, columns: Columns, slices: Sequence[Slice]) -> list[frozenset[Term]]:
        """What is known of each image that was drawn."""
        ...

    def choose(
        self, wanted: Sequence[tuple[Slice, int]], confirming: bool, taken: set[int], once: bool = False
    ) -> list[list[int]]:
        """Rows to draw for each slice, at most as many as wanted, -1 where there are none to choose from.

        Args:
            confirming: whether to take from the images that confirm; the first slice of a label is its base then, and no
                image is taken for both.
            taken: rows that are used up.
            once: whether slices that overlap share no image; those that are tested do, each on all that it covers.
        """
        ...

    def draw(self, asked: Asked) -> Columns:
        """ "image" uint8 [B, C, H, W], and the fields."""
        ...


def open_generator(
    config: GeneratorConfig, labels: dict[str, str], attributes: dict[str, list[str]], seed: int, device: str
) -> Generator:
    """A generator; its networks are loaded when it draws.

    Args:
        labels: each label's prompt.
        attributes: and the values that are looked at.

    Raises:
        UserError: there is none, or it cannot draw what is asked for.
    """
    if config.images:
        return RealImages(config, labels, attributes, seed)
    if config.pipeline:
        return Pipeline(config, labels, attributes, seed, device)
    return OwnModel(config, labels, attributes, seed, device)


def prompt_of(of: Slice, labels: dict[str, str], properties: Sequence[str] = ()) -> str:
    """The label's prompt, then the values and phrases of the slice, but for those that are drawn by a property."""
    said = [value for name, value in of.values.items() if name not in properties]
    return ", ".join([labels[of.label], *said, *of.phrases])


class _Drawn:
    """What generators without a fixed set of images have in common."""

    def __init__(self) -> None:
        self.fields, self.captioned, self.takes_words = {PROMPT: Field("str")}, False, True

    def values(self, attribute: str, given: Sequence[str]) -> list[str]:
        if not given:
            raise UserError(f"discover.attributes.{attribute}: list the values that are to be drawn.")
        return list(given)

    def terms(self, columns: Columns, slices: Sequence[Slice]) -> list[frozenset[Term]]:
        return [frozenset(s.terms) for s in slices]

    def choose(
        self, wanted: Sequence[tuple[Slice, int]], confirming: bool, taken: set[int], once: bool = False
    ) -> list[list[int]]:
        return [[-1] * count for _, count in wanted]


class OwnModel(_Drawn):
    """A run of jobs/train_diffusion.py or jobs/finetune_private.py."""

    def __init__(
        self, config: GeneratorConfig, labels: dict[str, str], attributes: dict[str, list[str]], seed: int, device: str
    ) -> None:
        super().__init__()
        self.config, self.labels, self.seed, self.device = config, labels, seed, device
        run = Store(config.model)
        if not run.exists("config.yaml"):
            raise UserError(f"There is no run at '{config.model}'; give the run dir of a trained diffusion model.")
        diffusion = configuration.section(DiffusionConfig, run.read("config.yaml"), "diffusion")
        self.latents = Dataset.open(diffusion.latents).header
        conditions = Conditions.of(diffusion.conditioned, self.latents)
        self.properties = [name for name in conditions.values if name != LABEL]
        self.by_label, self.takes_words = LABEL in conditions.values, bool(conditions.text)
        properties = {name: attributes[name] for name in self.properties if attributes.get(name)}
        prompts = list(labels.values()) if self.takes_words else []
        generate = GenerateConfig(
            model=config.model,
            out="",
            samples=1,
            properties=properties,
            prompts=prompts,
            sampler=config.sampler,
            policy=PolicyConfig(use=False),  # what is asked for are the classes of a classifier
        )
        header = plan(generate, seed)
        self.shape = header.fields["image"].shape
        kept = ("model", "model_commit", "autoencoder_commit", "sampler", "private")
        self.said = {name: header.provenance[name] for name in kept}
        unknown = [name for name in labels if name not in self.latents.classes]
        if not self.takes_words and (unknown or not self.by_label):
            there = ", ".join(self.latents.classes) if self.by_label else "none, and no text"
            raise UserError(
                f"The model '{config.model}' cannot draw '{next(iter(unknown or labels))}'; it knows {there}."
            )
        foreign = sorted(set(attributes) - set(self.properties))
        if not self.takes_words and foreign:
            raise UserError(
                f"discover.attributes.{foreign[0]}: the model '{config.model}' has no such property and takes no text; its "
                f"properties are {', '.join(self.properties) or 'none'}."
            )

    def values(self, attribute: str, given: Sequence[str]) -> list[str]:
        known = self.latents.values_of(attribute) if attribute in self.properties else ()
        return super().values(attribute, list(given) or known)

    @cached_property
    def model(self) -> TrainedModel:
        model = TrainedModel(self.config.model, self.device)
        if commit_hash(model.commit) != self.said["model_commit"]:
            raise UserError(
                f"The model '{self.config.model}' has a newer commit by now; give discover.out another place."
            )
        model.prepare(self.config.sampler)
        model.draws(self.shape)
        return model

    def draw(self, asked: Asked) -> Columns:
        prompts = [prompt_of(s, self.labels, self.properties) for s in asked.slices]
        condition: Condition = self.model.conditions.nothing(len(prompts), self.device)
        for name in self.model.conditions.values:
            known = self.latents.values_of(name)
            named = [s.label if name == LABEL else s.values.get(name, "") for s in asked.slices]
            numbers = [known.index(value) if value in known else -1 for value in named]
            condition[name] = torch.tensor(numbers, device=self.device)
        if self.takes_words:
            condition[TEXT] = self.model.text(prompts)
        ids = torch.from_numpy(asked.ids).to(self.device)
        images = self.model.draw(condition, ids, self.seed, self.config.sampler).cpu().numpy()
        return {"image": images, PROMPT: np.array(prompts, object)}


class Pipeline(_Drawn):
    """A pipeline of diffusers."""

    def __init__(
        self, config: GeneratorConfig, labels: dict[str, str], attributes: dict[str, list[str]], seed: int, device: str
    ) -> None:
        super().__init__()
        self.config, self.labels, self.seed, self.device = config, labels, seed, device
        index = Path(config.pipeline, "model_index.json")
        if not index.is_file():
            raise UserError(f"'{config.pipeline}' is no folder of a diffusers pipeline: it has no model_index.json.")
        self.shape = (3, *config.size)
        sampler = {"steps": config.sampler.steps, "guidance": config.sampler.guidance}
        digest = hashlib.sha256(index.read_bytes())
        folder = Path(config.pipeline)
        for file in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.bin")):
            with file.open("rb") as data:
                digest.update(hashlib.file_digest(data, "sha256").digest())
        # What it takes is known before it is loaded, and before anything is drawn that it could not go on from.
        known = json.loads(index.read_bytes())
        self.takes = inspect.signature(self._kind(known["_class_name"]).__call__).parameters
        self.by = next((name for name in (PROMPT, CLASS_LABELS) if name in self.takes), "")
        if not self.by:
            raise UserError(
                f"The pipeline '{config.pipeline}' takes neither a prompt nor class labels; give one that does."
            )
        self.takes_words, self.numbers = self.by == PROMPT, numbers_of(known.get("id2label") or {})
        if self.by == CLASS_LABELS and (unknown := [label for label in labels if label not in self.numbers]):
            raise UserError(
                f"The pipeline '{config.pipeline}' knows no class '{unknown[0]}'; name the labels in discover.labels as the "
                f"id2label of its model_index.json does: {', '.join(list(self.numbers)[:8]) or 'it has none'}."
            )
        if self.by == CLASS_LABELS and attributes:
            raise UserError(
                f"discover.attributes.{next(iter(attributes))}: the pipeline '{config.pipeline}' takes class labels alone; "
                "give a pipeline that takes a prompt, or a model of ours that has the attribute as a property."
            )
        self.said = {"pipeline": config.pipeline, "pipeline_digest": digest.hexdigest()[:16], "sampler": sampler}

    def _kind(self, name: str | list[str]) -> Any:
        """The class of the pipeline: one of diffusers, or [file, name] of one whose code is in the folder."""
        import diffusers
        from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

        if isinstance(name, list):
            with self._loading():
                return get_class_from_dynamic_module(
                    self.config.pipeline, f"{name[0]}.py", class_name=name[1], local_files_only=True,
                    trust_remote_code=self.config.trust_code,
                )  # fmt: skip
        if not hasattr(diffusers, name):
            raise UserError(
                f"The pipeline '{self.config.pipeline}' is a {name}, which this diffusers lacks; update it."
            )
        return getattr(diffusers, name)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"The pipeline '{self.config.pipeline}' cannot be loaded ({str(error).splitlines()[0]}); if its folder has "
                "code that you trust, say discover.generator.trust_code=true."
            ) from error

    @cached_property
    def pipeline(self) -> Any:
        from diffusers import DiffusionPipeline

        with self._loading():
            pipeline: Any = DiffusionPipeline.from_pretrained(
                self.config.pipeline, trust_remote_code=self.config.trust_code, local_files_only=True
            ).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, asked: Asked) -> Columns:
        if self.by == PROMPT:
            prompts = [prompt_of(s, self.labels) for s in asked.slices]
            given: dict[str, Any] = {PROMPT: prompts}
        else:
            assert not any(s.terms for s in asked.slices), "a slice that takes words"
            prompts = [s.label for s in asked.slices]
            given = {CLASS_LABELS: [self.numbers[label] for label in prompts]}
        # A generator for each image: what it shows depends on no other.
        index = torch.from_numpy(asked.ids)
        row = torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=1)
        seeds = (keyed.uniform(self.seed, "pipeline", row).double() * 2**52).long().tolist()
        size = dict(zip(("height", "width"), self.config.size, strict=True))
        images = self.pipeline(
            **given,
            **{name: side for name, side in size.items() if name in self.takes},
            num_inference_steps=self.config.sampler.steps,
            guidance_scale=self.config.sampler.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pil",
        ).images
        found = np.stack([np.moveaxis(np.asarray(image.convert("RGB")), -1, 0) for image in images])
        if found.shape[1:] != self.shape:
            raise UserError(
                f"The pipeline '{self.config.pipeline}' draws {found.shape[2]}x{found.shape[3]} pixels; give that in "
                "discover.generator.size."
            )
        return {"image": found, PROMPT: np.array(prompts, object)}


def numbers_of(names: dict[str, str]) -> dict[str, int]:
    """The number of each class by its name, and by each of the names that a comma parts, as `DiTPipeline` has them."""
    found: dict[str, int] = {}
    for number, name in names.items():
        for one in name.split(","):
            found.setdefault(one.strip(), int(number))
    return {**found, **{name: int(number) for number, name in names.items()}}


class RealImages:
    """A dataset of labelled images: of every slice those that there are, in a keyed order, none of them twice."""

    def __init__(
        self, config: GeneratorConfig, labels: dict[str, str], attributes: dict[str, list[str]], seed: int
    ) -> None:
        self.config, self.attributes, self.seed = config, list(attributes), seed
        self.dataset = Dataset.open(config.images)
        header = self.dataset.header
        there = [name for name, f in header.fields.items() if not f.array]
        wanted = [LABEL, *attributes, *([config.group] if config.group else [])]
        if missing := [name for name in wanted if name not in there]:
            raise UserError(f"{self.dataset.uri} has no field '{missing[0]}'; it has {', '.join(there)}.")
        if unknown := [name for name in labels if name not in header.classes]:
            known = ", ".join(header.classes)
            raise UserError(f"{self.dataset.uri} has no images of '{unknown[0]}'; its classes are {known}.")
        self.captioned = self.takes_words = config.caption in there
        carried = [*attributes, *([config.caption] if self.captioned else [])]
        self.shape, self.fields = (
            header.fields["image"].shape,
            {**dict.fromkeys(carried, Field("str")), ROW: Field("int")},
        )
        self.said = {"images": self.dataset.uri, "manifest": self.dataset.manifest_hash()}
        if "private" in header.provenance:
            self.said["private"] = header.provenance["private"]
        self.reader = Reader(self.dataset, ["image", *carried])

    @cached_property
    def columns(self) -> dict[str, list[str]]:
        """Label, attributes, caption and group of all images."""
        names = list(dict.fromkeys([LABEL, *self.attributes, *([self.config.caption] if self.captioned else [])]))
        names += [self.config.group] if self.config.group and self.config.group not in names else []
        reader, total, found = Reader(self.dataset, names), self.dataset.header.num_samples, dict[str, list[str]]()
        for begin in range(0, total, AT_ONCE):
            part = reader.gather(np.arange(begin, min(begin + AT_ONCE, total)))
            for name in names:
                found.setdefault(name, []).extend(self._texts(name, part[name]))
        return found

    def _texts(self, name: str, column: np.ndarray) -> list[str]:
        values = self.dataset.header.values_of(name)
        return [(values[v] if v >= 0 else "") if values else str(v) for v in column]

    @cached_property
    def known(self) -> list[frozenset[Term]]:
        """The terms of all images."""
        found = []
        for row, label in enumerate(self.columns[LABEL]):
            values = {name: self.columns[name][row] for name in self.attributes}
            words = described(self.columns[self.config.caption][row], label) if self.captioned else frozenset()
            found.append(words | {Term(name, value) for name, value in values.items() if value})
        return found

    @cached_property
    def groups(self) -> list[str]:
        """What must not be torn apart."""
        return self.columns[self.config.group] if self.config.group else list(map(str, range(len(self.known))))

    @cached_property
    def order(self) -> dict[tuple[str, bool], list[int]]:
        """By label, and whether they confirm: the images in the order in which they are taken."""
        halves, found = {"finding": 0.5, "confirming": 0.5}, dict[tuple[str, bool], list[int]]()
        for row in sorted(range(len(self.known)), key=lambda row: _position(row, self.seed)):
            # Not by the group alone, by which the parts of an import are cut too.
            half = assign(f"discovery/{self.groups[row]}", halves, self.seed)
            found.setdefault((self.columns[LABEL][row], half == "confirming"), []).append(row)
        return found

    def values(self, attribute: str, given: Sequence[str]) -> list[str]:
        there = sorted(set(self.columns[attribute]) - {""})
        if unknown := [value for value in given if value not in there]:
            raise UserError(
                f"{self.dataset.uri} has no image with {attribute}={unknown[0]}; it has {', '.join(there)}."
            )
        return list(given) or there

    def terms(self, columns: Columns, slices: Sequence[Slice]) -> list[frozenset[Term]]:
        return [self.known[row] for row in columns[ROW]]

    def choose(
        self, wanted: Sequence[tuple[Slice, int]], confirming: bool, taken: set[int], once: bool = False
    ) -> list[list[int]]:
        used, found = set(taken), []
        for of, count in wanted:
            terms, there = set(of.terms), self.order.get((of.label, confirming), [])
            rows = [row for row in there if row not in used and terms <= self.known[row]]
            rows = in_turn([self.groups[row] for row in rows], rows)
            if confirming and not terms:
                count = min(count, len(rows) // 2)  # the other half is left for the slices
            found.append(rows[:count])
            if once or not confirming or not terms:
                used |= set(found[-1])
        return found

    def draw(self, asked: Asked) -> Columns:
        columns = self.reader.gather(asked.rows)
        carried = {n: np.array(self._texts(n, columns[n]), object) for n in self.fields if n != ROW}
        return {"image": columns["image"], ROW: asked.rows, **carried}


def in_turn(groups: Sequence[str], rows: Sequence[int]) -> list[int]:
    """The first row of every group, then the second of every group that has one, and so on: images of one group are no
    independent examples, so that any number of rows is to have as many groups as it can."""
    seen: Counter[str] = Counter()
    rounds = []
    for group in groups:
        rounds.append(seen[group])
        seen[group] += 1
    return [row for _, row in sorted(zip(rounds, rows, strict=True), key=lambda pair: pair[0])]


def _position(row: int, seed: int) -> bytes:
    return hashlib.blake2b(f"discovery/{seed}/{row}".encode(), digest_size=8).digest()
