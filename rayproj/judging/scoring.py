"""What every image of a prompt set is worth, as committed shards: any number of makers, resumable, thousands of prompts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import Sample
from rayproj.discovery.captions import EmbedderConfig, open_embedder
from rayproj.engine.checkpoint import commits
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.folders import contents
from rayproj.evaluation.models import ExaminedConfig, open_classifier
from rayproj.evaluation.watermark import REAL
from rayproj.judging.alignment import AlignmentConfig, measures
from rayproj.judging.extraction import adaptive_distance
from rayproj.judging.prompts import categories, read_questions
from rayproj.judging.records import ServedConfig
from rayproj.responsibility.policy import PolicyConfig
from rayproj.responsibility.safety import SafetyConfig
from rayproj.storage.store import Store, sha256_hex, to_json
from rayproj.synthesis.plan import commit_hash

FEATURE, SECOND, IMAGES = "feature", "second_feature", "images"
PIXELS = 32  # side at which pixels are compared
# Options that no score depends on.
ELSEWHERE = {
    "models", "attempts", "reference", "out", "batch", "human", "question", "adversarial", "policy", "safety", "cards",
    "watermark_key", "playground", "trust", "signed", "pairs", "labelled", "labelled_group",
}  # fmt: skip


@dataclass
class JudgeConfig:
    """Whose images are judged, by what."""

    out: str = "???"  # the scores go to <out>/scores/<name>, the report beside them
    models: dict[str, str] = field(default_factory=dict)  # name -> dataset of jobs/generate.py, of the same prompts
    reference: str = ""  # real images with captions, which are scored as the models' are: what can be reached
    samples: int = 2000  # of these, evenly spread over the set
    learned_from: str = ""  # the images that the models were trained on: the nearest of them
    # name -> dataset drawn from captions of `learned_from`: attempts to get a training image back.
    attempts: dict[str, str] = field(default_factory=dict)
    captions: str = "caption"  # the field of real images with what they show
    prompts: str = ""  # file with the prompts' categories
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    feature_size: int = 64  # side to which images are resized for EfficientNet-lite0
    # A second extractor of features: a folder of an image model of transformers, such as DINOv2, or the run dir of a
    # classifier of this project.
    extractor: str = ""
    attributes: dict[str, ExaminedConfig] = field(default_factory=dict)  # perceived attribute -> the classifier of it
    # Perceived attribute -> real images that bear its kinds as labels, unseen by the classifier: how often it is right on
    # them (`samples` at most), and what the shares that it perceives would be without its mistakes.
    labelled: dict[str, str] = field(default_factory=dict)
    labelled_group: str = (
        ""  # their field of what belongs together, such as variants of a figure: intervals are over it
    )
    people: str = "people"  # the category whose images these are looked for in; "": all
    # What people prefer: the run dir of jobs/serve_study.py or the .parquet file of `rayproj study export`, whose results go
    # into the report, or JSON lines {"first", "second", "wins", "losses"}; and by which of its questions models are ordered,
    # of a study by its ratings of the judged prompts alone.
    human: str = ""
    question: str = "alignment"
    # Adversarial prompts with their kinds, a .csv file with the columns prompt and category: how many of them the
    # policy stops, plain and disguised, and how many of the captions of `reference`. "": it is not tried.
    adversarial: str = ""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)  # of the report: what does not pass is shown grey
    # File with the secret of the models' watermark: what it survives, against the images of `reference`.
    watermark_key: str = ""
    trust: str = ""  # PEM file of those whose signatures on datasets and images are trusted
    signed: str = (
        ""  # folder of images with a C2PA manifest or sidecar, such as the playground's answers: how many verify
    )
    playground: ServedConfig = field(default_factory=ServedConfig)
    pairs: int = 6  # images of each set that are shown beside their nearest in `learned_from`; none of a private model
    cards: list[str] = field(default_factory=list)  # runs of models, and datasets, whose cards go beside the report
    batch: int = 64

    def problems(self) -> list[str]:
        found = [] if self.models else ["judge.models must name the dataset of a model."]
        found += [f"judge.{n} must be positive." for n in ("samples", "batch", "feature_size") if getattr(self, n) < 1]
        if self.pairs < 0:
            found.append("judge.pairs must not be negative.")
        if both := sorted({*self.models} & {*self.attempts, "reference"}):
            found.append(f"judge.models: '{both[0]}' is the name of other images too; choose another.")
        if self.attempts and not self.learned_from:
            found.append("judge.attempts needs judge.learned_from, the images that they may be copies of.")
        if unknown := sorted({*self.labelled} - {*self.attributes}):
            found.append(f"judge.labelled: '{unknown[0]}' is none of judge.attributes; name its classifier there.")
        if REAL in {*self.models, *self.attempts}:
            found.append(f"judge.models: '{REAL}' names the real images; choose another name.")
        names = [uri.rstrip("/").rpartition("/")[2] for uri in self.cards]
        if twice := [name for name in names if names.count(name) > 1]:
            found.append(f"judge.cards: two of them end in '{twice[0]}', as their cards would be named; leave one out.")
        if self.watermark_key and not self.reference:
            found.append("judge.watermark_key needs judge.reference, real images to tell marked ones from.")
        return found

    def sets(self) -> dict[str, str]:
        """Every set of images that is scored, by name."""
        return {**self.models, **self.attempts, **({"reference": self.reference} if self.reference else {})}


def headers_of(config: JudgeConfig, index: str) -> dict[str, Header]:
    """Of the scores of every set, by its name. They name what scores depend on by its contents, so that scores of what has
    changed since are not gone on with.

    Raises:
        UserError: a set is not there, or its images come without texts.
    """
    found = {name: _images(config, name) for name in config.sets()}
    known = measures(config.alignment, index, "cpu")
    fields = {"prompt": Field("str"), "category": Field("str"), FEATURE: Field("npy", (1280,))}
    fields |= {f"measure_{k}": Field("float") for k in range(len(known))}
    if config.extractor:
        fields[SECOND] = Field("npy", (_Second(config.extractor, "cpu").dimensions,))
    for attribute, model in config.attributes.items():
        fields[f"attribute_{attribute}"] = Field("int", values=open_classifier(model, "cpu").classes)
    if config.learned_from:
        fields |= {"nearest": Field("int"), "nearest_ratio": Field("float")}
    said = {n: v for n, v in asdict(config).items() if n not in ELSEWHERE}
    provenance = {
        "measures": [measure.name for measure in known],
        "shares": [measure.name for measure in known if measure.share],
        "judge": said,
    }
    hashes = _contents(config, index)
    return {
        name: Header(
            f"scores of {name}", fields, len(_rows(config, name, images.header)), images.header.shard_size, (),
            provenance={
                **provenance,
                "images": images.uri,
                "contents": {**hashes, IMAGES: images.manifest_hash()},
                "sampler": images.header.provenance.get("sampler"),
            },
        )
        for name, images in found.items()
    }  # fmt: skip


def _contents(config: JudgeConfig, index: str) -> dict[str, str]:
    """Option -> hash of what is there: the commit of a run, the shards of a dataset, the files of a model."""
    alignment = config.alignment
    places = {f"attributes.{name}": model.model for name, model in config.attributes.items()}
    places |= {"extractor": config.extractor}
    places |= {f"alignment.{name}": getattr(alignment, name) for name in ("clip", "answers")}
    found = {option: contents_of(place) for option, place in places.items() if place}
    if alignment.questions:
        found["alignment.questions"] = sha256_hex(repr(read_questions(alignment.questions)).encode())
    if config.prompts:
        found["prompts"] = sha256_hex(to_json(categories(config.prompts)))
    if config.learned_from:
        found["learned_from"] = Dataset.open(config.learned_from).manifest_hash()
    if index:
        found["alignment.known"] = Dataset.open(index).manifest_hash()
    return found


def contents_of(place: str) -> str:
    """Identifies the newest commit of a run, or the files of a model."""
    done = commits(Store(place))
    return commit_hash(done[-1]) if done else contents(place)


def planned(config: JudgeConfig, name: str, header: Header) -> Dataset:
    """The scores of a set, begun or gone on with.

    Raises:
        UserError: there are some by other images, models or options.
    """
    place = f"{config.out}/scores/{name}"
    if Store(place).exists("dataset.json"):
        there, now = (h.provenance.get("contents", {}) for h in (Dataset.open(place).header, header))
        if changed := sorted(option for option in there.keys() & now.keys() if there[option] != now[option]):
            which = f"the images of '{name}'" if changed[0] == IMAGES else f"judge.{changed[0]}"
            raise UserError(
                f"'{place}' has scores by other contents of {which}; put these back, or give another judge.out."
            )
    return Dataset.create(place, header)


def texts(config: JudgeConfig, name: str) -> list[str]:
    """What the images of a set show, in order.

    Raises:
        UserError: as of `headers_of`.
    """
    images, text = _images(config, name), _text(config, name)
    return [str(t) for t in Reader(images, [text]).gather(np.arange(images.header.num_samples))[text]]


def _images(config: JudgeConfig, name: str) -> Dataset:
    images, text = Dataset.open(config.sets()[name]), _text(config, name)
    if text not in images.header.fields:
        raise UserError(f"{images.uri} has no field '{text}' with what its images show, and cannot be judged.")
    return images


class Scorer:
    """Makes shards of scores. Values: "config", as of `JudgeConfig`, "name", of the set, "index", "out"."""

    def __init__(self, values: dict[str, Any], device: str) -> None:
        self.config = config = configuration.from_dict(JudgeConfig, values["config"])
        self.device, self.text = device, _text(config, values["name"])
        self.header = Dataset.open(values["out"]).header
        images = Dataset.open(config.sets()[values["name"]])
        self.reader, self.rows = Reader(images, ["image", self.text]), _rows(config, values["name"], images.header)
        self.categories = categories(config.prompts) if config.prompts else {}
        self.measures = measures(config.alignment, values["index"], device)
        self.features = EfficientNetLite0Features(config.feature_size, device)
        self.second = _Second(config.extractor, device) if config.extractor else None
        self.attributes = {name: open_classifier(model, device) for name, model in config.attributes.items()}
        self.train = _pixels_of(config.learned_from) if config.learned_from else None

    def make(self, shard: int) -> list[Sample]:
        ids = np.asarray(self.header.shard_range(shard))
        return [
            sample
            for k in range(0, len(ids), self.config.batch)
            for sample in self._some(ids[k : k + self.config.batch])
        ]

    def _some(self, ids: np.ndarray) -> list[Sample]:
        columns = self.reader.gather(self.rows[ids])
        images, texts = torch.from_numpy(columns["image"]), [str(text) for text in columns[self.text]]
        features = self.features(images).cpu().numpy()
        found: dict[str, Any] = {FEATURE: features}
        found |= {f"measure_{k}": of(images, features, texts) for k, of in enumerate(self.measures)}
        if self.second:
            found[SECOND] = self.second(images)
        for name, model in self.attributes.items():
            found[f"attribute_{name}"] = model(images.to(self.device)).argmax(1).cpu().numpy()
        if self.train is not None:
            found["nearest_ratio"], found["nearest"] = adaptive_distance(small(images), self.train)
        return [
            {
                "key": f"{i:08d}",
                "prompt": texts[k],
                "category": self.categories.get(texts[k], ""),
                **{name: _plain(values[k]) for name, values in found.items()},
            }
            for k, i in enumerate(ids)
        ]


class _Second:
    """The second extractor: uint8 images [B, C, H, W] to float32 [B, D]."""

    def __init__(self, place: str, device: str) -> None:
        self.device = device
        if Store(place).exists("config.yaml"):
            network: Any = classifiers.load(place, device)
            if not hasattr(network, "pooled"):
                raise UserError(f"judge.extractor='{place}' is a classifier without pooled features; give another.")
            self.of = network.pooled
        else:
            self.of = open_embedder(EmbedderConfig(place), device)
        self.dimensions = self(torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        found: np.ndarray = self.of(images.to(self.device)).float().flatten(1).cpu().numpy()
        return found


def small(images: Tensor) -> np.ndarray:
    """Vectors float32 [n, 3 · PIXELS²] of uint8 images [n, C, H, W], antialiased where they are larger."""
    x = images.float().expand(-1, 3, -1, -1)
    if tuple(x.shape[2:]) != (PIXELS, PIXELS):
        x = F.interpolate(x, size=(PIXELS, PIXELS), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return x.flatten(1).numpy()


def _pixels_of(uri: str) -> np.ndarray:
    dataset = Dataset.open(uri)
    reader = Reader(dataset, ["image"])
    parts = [small(torch.from_numpy(reader.shard(shard)["image"])) for shard in range(dataset.header.num_shards)]
    return np.concatenate(parts).astype(np.float64)  # as distances are worked out, once


def _rows(config: JudgeConfig, name: str, images: Header) -> np.ndarray:
    """The images of a set that are scored, int64."""
    count = min(config.samples, images.num_samples) if name == "reference" else images.num_samples
    return np.linspace(0, images.num_samples - 1, count).astype(np.int64)


def _text(config: JudgeConfig, name: str) -> str:
    return config.captions if name == "reference" else "prompt"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True)
class Scores:
    """Of one set, in order.

    Attributes:
        columns: of the dataset, by field.
        measures: measure -> float64 [n].
        shares: those of them that are shares, from 0 to 1.
        attributes: attribute -> its values.
        guidance: with which the set was drawn; None of real images.
    """

    columns: dict[str, np.ndarray]
    measures: dict[str, np.ndarray]
    shares: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    guidance: float | None

    @classmethod
    def read(cls, uri: str) -> Scores:
        dataset = Dataset.open(uri)
        header = dataset.header
        columns = Reader(dataset).gather(np.arange(header.num_samples))
        named = {name: columns[f"measure_{k}"] for k, name in enumerate(header.provenance["measures"])}
        prefix = "attribute_"
        kinds = {n.removeprefix(prefix): f.values for n, f in header.fields.items() if n.startswith(prefix)}
        sampler = header.provenance.get("sampler") or {}
        return cls(columns, named, tuple(header.provenance["shares"]), kinds, sampler.get("guidance"))

    def by_prompt(self, measure: str) -> dict[str, float]:
        """The mean over the images of each prompt."""
        found = defaultdict(list)
        for prompt, value in zip(self.columns["prompt"], self.measures[measure], strict=True):
            found[str(prompt)].append(float(value))
        return {prompt: float(np.mean(values)) for prompt, values in found.items()}
