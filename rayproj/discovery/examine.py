"""Images of slices, classified: the shards of a stage's dataset, and what they say.

A stage is planned as a whole, in the header of its dataset: which slices, how many images of each, which rows of a dataset.
Its samples hold the image, what was asked for, and what every classifier said of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.discovery.captions import (
    FEATURE,
    CaptionConfig,
    EmbedderConfig,
    open_captioner,
    open_embedder,
)
from rayproj.discovery.generators import ROW, Asked, Generator, GeneratorConfig, open_generator
from rayproj.discovery.slices import Slice, Term, described
from rayproj.errors import UserError
from rayproj.evaluation.models import Examined, ExaminedConfig, open_classifier
from rayproj.responsibility import safety
from rayproj.responsibility.safety import TRIES, Safety, SafetyConfig

OWN = "classifier"  # the name of the one whose failures are looked for
SHOWS = "shows"  # the field with the captioner's words
APART = 1 << 24  # between the numbers, of 32 bits, of an image and of the one that is drawn in its place


@dataclass
class ExamineConfig:
    """What draws images, and what classifies and describes them."""

    classifier: ExaminedConfig = field(default_factory=ExaminedConfig)  # whose failures are looked for
    others: dict[str, ExaminedConfig] = field(default_factory=dict)  # which of them others share: name -> classifier
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    # The labels to look at -> the prompt of each; {}: every class of the classifier, by generator.prompt.
    labels: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, list[str]] = field(
        default_factory=dict
    )  # label -> the classes that are right; else its own name
    attributes: dict[str, list[str]] = field(default_factory=dict)  # attribute -> values to combine; []: all there are
    words: bool = True  # whether descriptions of images are looked at too, or the attributes alone
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    # What drawn images have to pass before they are looked at, written or shown: others are drawn in their place.
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    batch: int = 64  # images drawn and classified at once

    def problems(self) -> list[str]:
        found = [] if self.batch > 0 else ["discover.batch must be positive."]
        if OWN in self.others:
            found.append(f"discover.others: give the one called '{OWN}' another name.")
        if self.safety.rules and self.generator.images:
            found.append("discover.safety is for images that are drawn; jobs/curate.py sifts those of a dataset.")
        if not self.attributes and not self.words:
            found.append("discover needs attributes, words=true, or both.")
        return found


@dataclass(frozen=True)
class Stage:
    """Images of slices that are drawn together.

    Attributes:
        name: of its dataset.
        wanted: the slices, and how many images of each, at most.
        first: the number of the first image; no two images of a search have the same, which keys their randomness.
        finding: whether the images are embedded and described, so that slices can be found by them.
        paired: whether the images of all slices come of the same random numbers, so that those at the same place differ by
            what is asked for alone.
        once: whether no real image is taken for two slices that both cover it.
    """

    name: str
    wanted: Sequence[tuple[Slice, int]]
    first: int
    finding: bool
    confirming: bool = False
    paired: bool = False
    once: bool = False


class Bench:
    """The generator and the classifiers of a search, without anything drawn yet.

    Raises:
        UserError: something of it is not there, or does not go together.
    """

    def __init__(self, config: ExamineConfig, seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, device
        given = {OWN: config.classifier, **config.others}
        self.classifiers: dict[str, Examined] = {n: open_classifier(c, device) for n, c in given.items()}
        own = self.classifiers[OWN].classes
        prompts = config.labels or {name: config.generator.prompt.replace("{label}", name) for name in own}
        self.labels = {
            name: prompt or config.generator.prompt.replace("{label}", name) for name, prompt in prompts.items()
        }
        for name, classifier in self.classifiers.items():
            for label in self.labels:
                if unknown := [c for c in self.accepted(label) if c not in classifier.classes]:
                    some = ", ".join(classifier.classes[:8]) + (", ..." if len(classifier.classes) > 8 else "")
                    raise UserError(
                        f"The classifier '{name}' has no class '{unknown[0]}'; it has {some}. Name the classes that are "
                        f"right for the label '{label}' in discover.accepted."
                    )
        self.generator: Generator = open_generator(config.generator, self.labels, config.attributes, seed, device)
        if config.words and not self.generator.takes_words:
            lacks = "has no captions" if config.generator.images else "takes no text"
            raise UserError(f"discover.words: what draws the images {lacks}; look at attributes alone, by words=false.")
        self.attributes = {n: self.generator.values(n, values) for n, values in config.attributes.items()}

    def accepted(self, label: str) -> list[str]:
        """The classes that are right for a label."""
        return self.config.accepted.get(label, [label])

    @property
    def captions(self) -> bool:
        """Whether images are to be described here: they come without descriptions, and those are looked at."""
        return self.config.words and not self.generator.captioned

    def header(self, stage: Stage, taken: set[int], shard_size: int, index: str, dimensions: int) -> Header:
        """The plan of a stage.

        Args:
            taken: rows that stages before have used.
            index: the dataset by which a caption is retrieved.
            dimensions: of a feature.
        """
        rows = self.generator.choose(stage.wanted, stage.confirming, taken, stage.once)
        cells = [[of.to_json(), len(chosen)] for (of, _), chosen in zip(stage.wanted, rows, strict=True)]
        fields = {"image": Field("png", self.generator.shape), "label": Field("int"), "slice": Field("int")}
        fields |= self.generator.fields
        for name, classifier in self.classifiers.items():
            fields[f"predicted_{name}"] = Field("int", values=classifier.classes)
        fields["confidence"] = Field("float")
        if stage.finding and self.config.words:
            fields[FEATURE] = Field("npy", (dimensions,))
        if stage.finding and self.captions:
            fields[SHOWS] = Field("str")
        if self.config.safety.rules:
            fields[TRIES] = Field("int")
        drawn, whole = [row for chosen in rows for row in chosen], configuration.to_dict(self.config)
        said = {f.name: whole[f.name] for f in dataclasses.fields(ExamineConfig) if f.name != "safety"}
        return Header(
            name=f"{stage.name} of {len(self.labels)} labels",
            fields=fields,
            num_samples=len(drawn),
            shard_size=shard_size,
            classes=tuple(self.labels),
            provenance={
                **self.generator.said,
                "stage": stage.name,
                "slices": cells,
                "rows": drawn if any(row >= 0 for row in drawn) else [],
                "first": stage.first,
                "seed": self.seed,
                "classifiers": {name: c.digest for name, c in self.classifiers.items()},
                "index": index,
                **({"paired": True} if stage.paired else {}),
                **({"safety": safety.described(self.config.safety)} if self.config.safety.rules else {}),
                "examine": said,
            },
        )


def slices_of(header: Header) -> list[Slice]:
    """The slice of each sample."""
    return [of for cell, count in header.provenance["slices"] for of in [Slice.from_json(cell)] * count]


def numbers_of(header: Header) -> list[int]:
    """Of each sample the place of its slice among those of the stage."""
    return [k for k, (_, count) in enumerate(header.provenance["slices"]) for _ in range(count)]


def ids_of(header: Header) -> np.ndarray:
    """Of each sample the number that keys its randomness."""
    said = header.provenance
    if not said.get("paired"):
        return int(said["first"]) + np.arange(header.num_samples)
    return int(said["first"]) + np.concatenate([np.arange(count) for _, count in said["slices"]])


class Examiner:
    """Makes the shards of a stage: draws, classifies, embeds and describes. Config keys: "out"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.header = Dataset.open(config["out"]).header
        said = self.header.provenance
        own = configuration.from_dict(ExamineConfig, said["examine"])
        self.bench, self.batch, self.device = Bench(own, said["seed"], device), own.batch, device
        for name, classifier in self.bench.classifiers.items():
            if classifier.digest != said["classifiers"][name]:
                raise UserError(f"The classifier '{name}' has other weights by now; give discover.out another place.")
        for name, value in self.bench.generator.said.items():
            if value != said[name]:
                raise UserError(f"discover.generator: '{name}' is another by now; give discover.out another place.")
        self.slices, self.numbers, self.ids = slices_of(self.header), numbers_of(self.header), ids_of(self.header)
        self.rows = np.array(said["rows"] or [-1] * self.header.num_samples)
        self.embed = open_embedder(own.embedder, device) if FEATURE in self.header.fields else None
        self.caption = open_captioner(own.captions, said["index"], device) if SHOWS in self.header.fields else None
        self.safety = Safety(safety.planned(said["safety"]), device) if TRIES in self.header.fields else None

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        return [row for k in range(0, len(ids), self.batch) for row in self._examine(ids[k : k + self.batch])]

    def _examine(self, ids: np.ndarray) -> list[dict[str, Any]]:
        slices = [self.slices[i] for i in ids]
        columns = self.bench.generator.draw(Asked(slices, self.ids[ids], self.rows[ids]))
        if self.safety:
            columns[TRIES] = self._make_safe(self.safety, columns["image"], slices, ids)
        images = torch.from_numpy(columns["image"]).to(self.device)
        columns["label"] = np.array([self.header.classes.index(of.label) for of in slices])
        columns["slice"] = np.array([self.numbers[i] for i in ids])
        for name, classifier in self.bench.classifiers.items():
            confidence, answer = classifier(images).max(1)
            columns[f"predicted_{name}"] = answer.cpu().numpy()
            if name == OWN:
                columns["confidence"] = confidence.cpu().double().numpy().round(6)
        if self.embed:
            columns[FEATURE] = self.embed(images).cpu().numpy()
        if self.caption:
            columns[SHOWS] = np.array(self.caption(images, columns[FEATURE]), object)
        arrays = [name for name, f in self.header.fields.items() if f.array]
        values = {n: columns[n] if n in arrays else columns[n].tolist() for n in self.header.fields}
        return [{"key": f"{i:08d}", **{n: v[k] for n, v in values.items()}} for k, i in enumerate(ids)]

    def _make_safe(self, judge: Safety, images: np.ndarray, slices: list[Slice], ids: np.ndarray) -> np.ndarray:
        """Draw those that may not be shown anew, in place; how many it took of each, int64.

        Raises:
            UserError: of a sample none may be shown.
        """

        def again(at: np.ndarray, number: int) -> np.ndarray:
            asked = Asked([slices[k] for k in at], self.ids[ids[at]] + number * APART, self.rows[ids[at]])
            return self.bench.generator.draw(asked)["image"]

        withheld = judge.replaced(images, again)
        for of, reasons in zip(slices, withheld, strict=True):
            if len(reasons) == judge.config.tries:
                raise UserError(
                    f"Of {of.name} none of {judge.config.tries} images passed discover.safety.rules "
                    f"({', '.join(reasons[-1])}); leave it out, raise discover.safety.tries, or loosen the rule."
                )
        return np.array([1 + len(reasons) for reasons in withheld])


@dataclass(frozen=True)
class Results:
    """What a stage's dataset says, in columns of its length.

    Attributes:
        slices: that were asked for.
        answers: by classifier, the names of the predicted classes.
        failed: by classifier, bool.
        terms: what is known of each image.
        captions: where there are any, else "".
        features: fp32 [n, D], or None.
        rows: of the dataset of real images, -1 for generated ones.
        confidence: of the classifier in its answers, fp32.
        places: the address of a dataset and the number in it.
    """

    dataset: Dataset
    slices: list[Slice]
    answers: dict[str, np.ndarray]
    failed: dict[str, np.ndarray]
    terms: list[frozenset[Term]]
    captions: np.ndarray
    features: np.ndarray | None
    rows: np.ndarray
    confidence: np.ndarray
    places: list[tuple[str, int]]

    @property
    def name(self) -> str:
        """Of the stage."""
        return str(self.dataset.header.provenance["stage"])


def tries_of(dataset: Dataset) -> np.ndarray:
    """How many images were drawn for each sample until one passed the safety rules, int64."""
    count = dataset.header.num_samples
    if TRIES not in dataset.header.fields:
        return np.ones(count, np.int64)
    return Reader(dataset, [TRIES]).gather(np.arange(count))[TRIES]


def results(bench: Bench, dataset: Dataset) -> Results:
    """Read a stage whose shards are all there."""
    header = dataset.header
    names = [name for name in header.fields if name != "image"]
    columns = Reader(dataset, names).gather(np.arange(header.num_samples))
    slices, answers, failed = slices_of(header), {}, {}
    right = {label: set(bench.accepted(label)) for label in bench.labels}
    for name, classifier in bench.classifiers.items():
        known = np.array(classifier.classes, object)
        answers[name] = known[columns[f"predicted_{name}"]]
        failed[name] = np.array([a not in right[s.label] for a, s in zip(answers[name], slices, strict=True)], bool)
    terms = bench.generator.terms(columns, slices)
    none = np.full(len(slices), "", object)
    captions = columns.get(SHOWS, columns.get(bench.config.generator.caption, none))
    if SHOWS in columns:
        terms = [t | described(c, s.label) for t, c, s in zip(terms, captions, slices, strict=True)]
    if not bench.config.words:
        terms = [frozenset(term for term in t if term.attribute) for t in terms]
    rows = columns.get(ROW, np.full(len(slices), -1))
    places = [(dataset.uri, i) for i in range(header.num_samples)]
    sure = columns["confidence"]
    return Results(dataset, slices, answers, failed, terms, captions, columns.get(FEATURE), rows, sure, places)
