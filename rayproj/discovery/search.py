"""A search for failures under way: what it was asked for, the stages it has drawn, and how it draws another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

import numpy as np
import torch

from rayproj.data.dataset import Dataset
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.sources.base import SourceConfig, SourceKind
from rayproj.discovery.captions import index_header, open_embedder
from rayproj.discovery.examine import Bench, ExamineConfig, Results, Stage, results
from rayproj.discovery.generators import GeneratorConfig
from rayproj.discovery.slices import Slice

EXAMINER, INDEXER = "rayproj.discovery.examine:Examiner", "rayproj.discovery.captions:Indexer"

Make = Callable[[Dataset, str, dict[str, Any]], Any]
"""Makes the shards of a planned dataset that are not there yet, by the maker of that name, given those values."""


class Per(StrEnum):
    """Of what there is a quota."""

    finding = auto()
    label = auto()


@dataclass
class ReplicationConfig:
    """Another generator, by which findings are tested again: they might be a weakness of the one that showed them."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    images: int = 200  # of each finding; of its label twice as many

    def problems(self) -> list[str]:
        return [] if self.images > 0 else ["discover.replications: images must be positive."]


@dataclass
class DiscoverConfig(ExamineConfig):
    """What is examined, with how many images, and what counts as a finding."""

    out: str = "???"  # a folder for the datasets of all stages, failures.json and .html, predictions.parquet
    images: int = 4000  # that the search may look at
    find: float = 0.5  # share of them by which slices are found; the others confirm
    rounds: int = 2  # of finding
    slices: int = 8  # that are tested, at most
    longest: int = 2  # terms of a slice
    level: float = 0.05  # of the false discovery rate
    least_ratio: float = 1.25  # to be a finding, a slice also fails this many times as often as its label
    # Further images of each finding, drawn with and without each of its terms from the same noise.
    counterfactuals: int = 0
    # Looks at the images that confirm, which share the level: a slice that is a finding after one needs no more of them.
    looks: int = 1
    replications: dict[str, ReplicationConfig] = field(default_factory=dict)  # by other generators or on real images
    scale_up: int = 0  # further images of the slices that were found, of which the failures become a dataset
    # Failures in that dataset of each finding or label, exactly; scale_up is then the most images that are drawn for them.
    quota: int = 0  # 0: all there are
    quota_per: Per = Per.finding
    shard_size: int = 64

    def problems(self) -> list[str]:
        found = super().problems()
        names = ("images", "rounds", "slices", "longest", "looks", "shard_size")
        found += [f"discover.{name} must be positive." for name in names if getattr(self, name) <= 0]
        if not 0 < self.find < 1:
            found.append(f"discover.find is a share in (0, 1), not {self.find:g}.")
        if not 0 < self.level < 1:
            found.append(f"discover.level lies in (0, 1), not {self.level:g}.")
        found += [
            f"discover.{n} must not be negative."
            for n in ("counterfactuals", "scale_up", "quota")
            if getattr(self, n) < 0
        ]
        if self.quota > self.scale_up:
            found.append(
                f"discover.quota={self.quota}: so many failures are not among scale_up={self.scale_up} images; raise that."
            )
        if self.counterfactuals and self.generator.images:
            found.append("discover.counterfactuals: real images cannot be drawn again; it needs a model or a pipeline.")
        same = (self.generator.model, self.generator.pipeline, self.generator.images)
        for name, other in self.replications.items():
            if (other.generator.model, other.generator.pipeline, other.generator.images) == same:
                found.append(f"discover.replications.{name} is what the search draws from; give another one.")
        return found


@dataclass(frozen=True)
class Search:
    """A search under way."""

    config: DiscoverConfig
    bench: Bench
    make: Make
    index: str = ""
    dimensions: int = 0
    done: list[Results] = field(default_factory=list)

    @property
    def looked_at(self) -> int:
        return sum(len(stage.slices) for stage in self.done)

    def run(
        self,
        name: str,
        wanted: list[tuple[Slice, int]],
        confirming: bool = False,
        paired: bool = False,
        once: bool = False,
    ) -> Results:
        """Draw and classify images of slices, or read them if they are there."""
        stage = Stage(name, wanted, self.looked_at, not confirming, confirming, paired, once)
        taken = {int(row) for found in self.done for row in found.rows if row >= 0}
        header = self.bench.header(stage, taken, self.config.shard_size, self.index, self.dimensions)
        dataset = Dataset.create(f"{self.config.out}/{name}", header)
        self.make(dataset, EXAMINER, {"out": dataset.uri})
        self.done.append(results(self.bench, dataset))
        return self.done[-1]


def prepared(config: DiscoverConfig, seed: int, make: Make) -> Search:
    """The search before its first image; known images are embedded, where captions are retrieved from them."""
    bench = Bench(config, seed, "cpu")
    if not config.words:
        return Search(config, bench, make)
    width = int(
        open_embedder(config.embedder, "cpu")(torch.zeros(1, *bench.generator.shape, dtype=torch.uint8)).shape[1]
    )
    if not bench.captions or config.captions.model:
        return Search(config, bench, make, "", width)
    uri = config.captions.images
    if not uri:
        source = SourceConfig(kind=SourceKind.emoji, attributes=["caption", "style"])
        import_dataset(ImportConfig(source=source, out=f"{config.out}/known"), lambda event: None)
        uri = f"{config.out}/known/train"
    known = Dataset.open(uri)
    index = Dataset.create(f"{config.out}/index", index_header(config.captions, config.embedder, known, width))
    make(index, INDEXER, {"out": index.uri, "batch": config.batch})
    return Search(config, bench, make, index.uri, width)


def shared(slices: list[Slice], images: int) -> list[tuple[Slice, int]]:
    """So many images over all slices alike, the first ones one more where they do not divide."""
    each, more = divmod(images, len(slices))
    return [(of, each + (k < more)) for k, of in enumerate(slices) if each + (k < more)]


def joined(drawn: Sequence[Results]) -> Results:
    """The images of several stages as one; the dataset is that of the first."""
    first = drawn[0]
    names = list(first.answers)
    return Results(
        first.dataset,
        [of for stage in drawn for of in stage.slices],
        {name: np.concatenate([stage.answers[name] for stage in drawn]) for name in names},
        {name: np.concatenate([stage.failed[name] for stage in drawn]) for name in names},
        [terms for stage in drawn for terms in stage.terms],
        np.concatenate([stage.captions for stage in drawn]),
        None,
        np.concatenate([stage.rows for stage in drawn]),
        np.concatenate([stage.confidence for stage in drawn]),
        [place for stage in drawn for place in stage.places],
    )
