"""The search: look at images, propose slices, look closer, and confirm on other images what stands out.

    look-1       images of every label, over all combinations of the attributes
    closer-2     images of the slices that seem to fail more, and of those slices without one of their terms; where none
                 does, look-2: more images of every label
    confirm      other images of the slices proposed by then, and of their labels as such: the only ones that are tested; in
                 several looks, of which the later ones draw no more of what is a finding already
    scale        if asked for: many images of the slices that were confirmed
    adversarial  of these, the failures
    pairs        if asked for: images of the slices that were confirmed, and of these slices without one of their terms, from
                 the same random numbers
    by-NAME      if asked for: images of these slices and their labels by another generator, or of real images

A stage is a dataset of committed shards, planned as a pure function of the config and of the stages before, so a search that
was stopped anywhere goes on, and ends with the same findings.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch

from rayproj.data.dataset import Dataset, Header
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.reader import Reader
from rayproj.data.sources.base import SourceConfig, SourceKind
from rayproj.data.writer import commit_shard
from rayproj.discovery.captions import index_header, open_embedder
from rayproj.discovery.clusters import clusters, stability
from rayproj.discovery.examine import FEATURE, OWN, Bench, ExamineConfig, Results, Stage, results, tries_of
from rayproj.discovery.generators import GeneratorConfig, prompt_of
from rayproj.discovery.propose import Looked, Proposal, propose
from rayproj.discovery.slices import Slice, Term
from rayproj.errors import UserError
from rayproj.evaluation.proportions import Rate, adjusted, detectable, higher, ratio, sign_test

EXAMINER, INDEXER = "rayproj.discovery.examine:Examiner", "rayproj.discovery.captions:Indexer"
SHOWN, CLOSEST = 12, 6  # images of a finding, and of a cluster of failures, that are named

Make = Callable[[Dataset, str, dict[str, Any]], Any]
"""Makes the shards of a planned dataset that are not there yet, by the maker of that name, given those values."""


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
            f"discover.{n} must not be negative." for n in ("counterfactuals", "scale_up") if getattr(self, n) < 0
        ]
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


def discover(config: DiscoverConfig, seed: int, make: Make) -> dict[str, Any]:
    """Search for slices in which the classifier fails more than on their label as such.

    Returns:
        "findings", the clearest first, "tested" slices that were none, the base rates, the images looked at, and the
        adversarial dataset with its transfer to the other classifiers. It is the same whenever and wherever it is searched.

    Raises:
        UserError: what the config names is not there or does not go together.
    """
    search = prepared(config, seed, make)
    again = {name: elsewhere(search, other) for name, other in config.replications.items()}
    budget, rounds = int(config.images * config.find), config.rounds
    search.run("look-1", first(search, budget // rounds))
    if not search.looked_at:
        raise UserError(
            "No image was drawn: discover.images is too small a budget, or discover.generator.images has none of the labels "
            "with the attributes' values."
        )
    for number in range(2, rounds + 1):
        images = (budget - search.looked_at) // (rounds + 1 - number)
        if slices := suspected(search):
            search.run(f"closer-{number}", shared(slices, images))
        else:
            search.run(f"look-{number}", first(search, images))
    proposals = propose(looked(search.done), config.slices, config.longest)
    failures = alike(search.done)
    tests = confirmed(search, proposals)
    found: dict[str, Any] = {
        "findings": [test for test in tests if test["finding"]],
        "tested": [test for test in tests if not test["finding"]],
        "base": base_rates(search.done),
        "clusters": failures,
        "images": search.looked_at,
        "budget": config.images,
        "level": config.level,
        "stages": {stage.name: _manifest(stage.dataset) for stage in search.done},
        "classifier": config.classifier.model,
        "classes": list(search.bench.classifiers[OWN].classes),
    }
    if config.scale_up and found["findings"]:
        found["adversarial"] = scaled_up(search, [Slice.of(*test["slice"]) for test in found["findings"]])
    if config.counterfactuals and found["findings"]:
        counterfactuals(search, found["findings"])
    if found["findings"]:
        for name, other in config.replications.items():
            replicate(again[name], name, other.images, found["findings"])
    return found


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


def first(search: Search, images: int) -> list[tuple[Slice, int]]:
    """So many images over all labels and combinations of attributes alike; the first ones get what is left over."""
    named = search.bench.attributes
    combinations: Iterable[tuple[str, ...]] = product(*named.values())
    combined = [
        Slice.of(label, [Term(n, v) for n, v in zip(named, values, strict=True) if v])
        for values in combinations
        for label in search.bench.labels
    ]
    return shared(combined, images)


def shared(slices: list[Slice], images: int) -> list[tuple[Slice, int]]:
    """So many images over all slices alike, the first ones one more where they do not divide."""
    each, more = divmod(images, len(slices))
    return [(of, each + (k < more)) for k, of in enumerate(slices) if each + (k < more)]


def suspected(search: Search) -> list[Slice]:
    """The slices that seem to fail more, and those slices without one of their terms."""
    config = search.config
    proposals = propose(looked(search.done), 2 * config.slices, config.longest)
    return list(dict.fromkeys(of for p in proposals for of in [p.slice, *p.slice.shorter()]))


def looked(done: list[Results]) -> Looked:
    """The images by which slices are found."""
    features = [stage.features for stage in done if stage.features is not None]
    return Looked(
        labels=np.array([of.label for stage in done for of in stage.slices], object),
        answers=np.concatenate([stage.answers[OWN] for stage in done]),
        failed=np.concatenate([stage.failed[OWN] for stage in done]),
        terms=[terms for stage in done for terms in stage.terms],
        base=np.concatenate([np.full(len(stage.slices), stage.name.startswith("look")) for stage in done]),
        features=np.concatenate(features) if features else None,
    )


def confirming(slices: list[Slice], images: int) -> list[tuple[Slice, int]]:
    """Of every slice as many images, and of every label of theirs twice as many: all its slices are held against it."""
    labels = [Slice(label) for label in dict.fromkeys(of.label for of in slices)]
    each = images // (2 * len(labels) + len(slices))
    return [(of, 2 * each) for of in labels] + [(of, each) for of in slices] if each else []


def confirmed(search: Search, proposals: list[Proposal]) -> list[dict[str, Any]]:
    """Every proposal, `tested` on fresh images, findings first and the most significant ones of these.

    With several looks each is held to its share of the level, and what is a finding after one is drawn no more: the images
    left are of the others. Over k looks the expected share of false findings is at most k times that of one.
    """
    config, rows, drawn, left = search.config, dict[Slice, dict[str, Any]](), list[Results](), proposals
    for look in range(config.looks):
        images = (config.images - search.looked_at) // (config.looks - look)
        wanted = confirming([p.slice for p in left], images) if left else []
        if not wanted:
            break
        name = "confirm" if config.looks == 1 else f"confirm-{look + 1}"
        drawn.append(search.run(name, wanted, confirming=True))
        new = tested(search, left, drawn, len(proposals) - len(left))
        rows |= {Slice.from_json(row["slice"]): row for row in new}
        left = [p for p in left if not rows.get(p.slice, {}).get("finding")]
    return sorted(rows.values(), key=lambda row: (not row["finding"], min(row["p"], row.get("p_as", 1.0)), row["name"]))


def tested(
    search: Search, proposals: list[Proposal], drawn: Sequence[Results], settled: int = 0
) -> list[dict[str, Any]]:
    """Each proposal with its rates on the images of some stages; pictures are those of the first.

    Two hypotheses are tested of each: that it fails more than its label, and that it is taken for its most common wrong
    class more often. The level is held over all of them together.

    Args:
        settled: proposals that were findings before; they count among the hypotheses, of which each has two.
    """
    config, rows = search.config, list[dict[str, Any]]()
    on = joined(drawn)
    places = {of: np.flatnonzero([s == of for s in on.slices]) for of in dict.fromkeys(on.slices)}
    hypotheses: list[tuple[int, str, float]] = []
    for proposal in proposals:
        own, base = (places.get(of, np.zeros(0, int)) for of in (proposal.slice, Slice(proposal.slice.label)))
        if not len(own) or not len(base):
            continue
        rates = [Rate(int(on.failed[OWN][at].sum()), len(at)) for at in (own, base)]
        as_wrong = [Rate(int((on.answers[OWN][at] == proposal.wrong).sum()), len(at)) for at in (own, base)]
        rows.append(_row(search, proposal, on, own, base, rates, as_wrong))
        hypotheses.append((len(rows) - 1, "p", higher(*rates)))
        if as_wrong[0] != rates[0] or as_wrong[1] != rates[1]:  # else both say the same
            hypotheses.append((len(rows) - 1, "p_as", higher(*as_wrong)))
    every = adjusted([p for _, _, p in hypotheses] + [1.0] * (2 * settled))[: len(hypotheses)]
    for (place, name, p), q in zip(hypotheses, every, strict=True):
        rows[place] |= {name: p, name.replace("p", "q", 1): min(1.0, config.looks * q)}
    strictest = config.level / config.looks / max(1, len(every) + 2 * settled)
    for row in rows:
        any_class = row["q"] <= config.level and _at_least(row["ratio"], config.least_ratio)
        one_class = row.get("q_as", 1.0) <= config.level and _at_least(row["ratio_as"], config.least_ratio)
        row["finding"], row["by_any_class"] = any_class or one_class, any_class
        row["hypotheses"] = len(every) + 2 * settled
        seen = Rate(row["base_rate"]["failures"], row["base_rate"]["images"])
        row["detectable"] = detectable(row["rate"]["images"], seen, strictest, config.least_ratio)
    return rows


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


def _row(
    search: Search,
    proposal: Proposal,
    on: Results,
    own: np.ndarray,
    base: np.ndarray,
    rates: list[Rate],
    as_wrong: list[Rate],
) -> dict[str, Any]:
    failed, answers = on.failed, on.answers[OWN]
    mistakes = [int(i) for i in own if failed[OWN][i]]
    surest = sorted(mistakes, key=lambda i: -on.confidence[i])
    others = {}
    for name in search.config.others:
        theirs = [Rate(int(failed[name][at].sum()), len(at)) for at in (own, base)]
        others[name] = {"slice": theirs[0].described(), "base": theirs[1].described(), "p": higher(*theirs)}
    # Where all others agree on one wrong class, the picture may not show what it was to show.
    agreed = [i for i in mistakes if others and len({on.answers[n][i] for n in [OWN, *others]}) == 1]
    captions = Counter(on.captions[i] for i in mistakes if on.captions[i])
    return {
        "name": proposal.slice.name,
        "slice": proposal.slice.to_json(),
        "label": proposal.slice.label,
        "prompt": prompt_of(proposal.slice, search.bench.labels),
        "rate": rates[0].described(),
        "base_rate": rates[1].described(),
        "ratio": _ratio(*rates),
        "wrong": proposal.wrong,
        "rate_as": as_wrong[0].described(),
        "base_rate_as": as_wrong[1].described(),
        "ratio_as": _ratio(*as_wrong),
        "confused": dict(Counter(answers[mistakes].tolist()).most_common()),
        "captions": dict(captions.most_common(5)),
        "others": others,
        "label_doubted": Rate(len(agreed), len(mistakes)).described() if others and mistakes else None,
        # As if none of these showed its label.
        "rate_undoubted": Rate(len(mistakes) - len(agreed), len(own) - len(agreed)).described()
        if others and len(own) > len(agreed)
        else None,
        "failures": [list(on.places[i]) for i in surest[:SHOWN]],
        "right": [list(on.places[i]) for i in own if not failed[OWN][i]][:SHOWN],
        "p_found": proposal.p,
    }


def _ratio(own: Rate, base: Rate) -> dict[str, float | None]:
    """None for what is infinite, which JSON has no word for."""
    found = zip(("value", "low", "high"), ratio(own, base), strict=True)
    return {name: value if math.isfinite(value) else None for name, value in found}


def _at_least(of: dict[str, float | None], least: float) -> bool:
    """A base without failures is exceeded however often."""
    return of["value"] is None or of["value"] >= least


def base_rates(done: list[Results]) -> dict[str, dict[str, float]]:
    """Of each label, over the first look at all of it."""
    rates = {}
    for label in dict.fromkeys(of.label for of in done[0].slices):
        failed = done[0].failed[OWN][[of.label == label for of in done[0].slices]]
        rates[label] = Rate(int(failed.sum()), len(failed)).described()
    return rates


def alike(done: list[Results]) -> list[dict[str, Any]]:
    """By label the clusters of the failures by which slices are found, the largest first: how many there are, of what wrong
    class, what their descriptions say, and the ones nearest to their middle; and how stable that answer's clusters are."""
    on, found = looked(done), list[dict[str, Any]]()
    captions, places = (
        [str(text) for stage in done for text in stage.captions],
        [p for stage in done for p in stage.places],
    )
    for label in dict.fromkeys(on.labels.tolist()):
        at = np.flatnonzero((on.labels == label) & on.failed)
        features = None if on.features is None else on.features[at]
        of, stable = clusters(on.answers[at], features), dict[Any, float]()
        if features is not None:
            stable = {wrong: stability(features[on.answers[at] == wrong]) for wrong in np.unique(on.answers[at])}
        for number in range(of.max(initial=-1) + 1):
            own = np.flatnonzero(of == number)
            if features is not None:
                far = np.linalg.norm(features[own] - features[own].mean(0), axis=1)
                own = own[np.argsort(far, kind="stable")]
            wrong = on.answers[at[own[0]]]
            said = Counter(captions[i] for i in at[own] if captions[i])
            found.append({
                "label": label,
                "wrong": str(wrong),
                "failures": len(own),
                "stability": None if math.isnan(stable.get(wrong, math.nan)) else stable[wrong],
                "captions": dict(said.most_common(3)),
                "shown": [list(places[i]) for i in at[own][:CLOSEST]],
            })  # fmt: skip
    return sorted(found, key=lambda cluster: -cluster["failures"])


def elsewhere(search: Search, config: ReplicationConfig) -> Search:
    """The same search with another generator, from which nothing is drawn yet.

    Raises:
        UserError: it lacks a label or an attribute.
    """
    # Of real images any values will do: slices of which there are none are not tested.
    attributes = {name: [] if config.generator.images else v for name, v in search.bench.attributes.items()}
    own = dataclasses.replace(search.config, generator=config.generator, attributes=attributes, words=False)
    return dataclasses.replace(search, config=own, bench=Bench(own, search.bench.seed, "cpu"), done=[])


def replicate(search: Search, name: str, images: int, findings: list[dict[str, Any]]) -> None:
    """Add to each finding its rates on so many images of this search, and whether it fails more there too, by the hypothesis
    that made it a finding, adjusted for their number; None where there are no images to tell."""
    slices, generator = [Slice.from_json(finding["slice"]) for finding in findings], search.bench.generator
    drawable = [of for of in slices if generator.takes_words or not of.phrases]
    labels = [Slice(label) for label in dict.fromkeys(of.label for of in drawable)]
    wanted = [(of, 2 * images) for of in labels] + [(of, images) for of in drawable]
    on, told = search.run(f"by-{name}", wanted, confirming=True), list[dict[str, Any]]()
    for finding, of in zip(findings, slices, strict=True):
        failed = on.failed[OWN] if finding["by_any_class"] else on.answers[OWN] == finding["wrong"]
        at = [np.array([k for k, s in enumerate(on.slices) if s == one], int) for one in (of, Slice(of.label))]
        rates = [Rate(int(failed[ids].sum()), len(ids)) for ids in at]
        told.append({"rate": rates[0].described(), "base_rate": rates[1].described(), "p": higher(*rates)})
        finding.setdefault("replications", {})[name] = told[-1]
    for one, q in zip(told, adjusted([one["p"] for one in told]), strict=True):
        tested = one["rate"]["images"] and one["base_rate"]["images"]
        one |= {"q": q, "replicated": q <= search.config.level if tested else None}


def counterfactuals(search: Search, findings: list[dict[str, Any]]) -> None:
    """Add to each finding what becomes of the same images without one of its terms: would the classifier be right, were it
    not for that? Pairs are drawn from the same random numbers, and tested by McNemar's exact test, one-sided."""
    slices = [Slice.from_json(finding["slice"]) for finding in findings]
    every = list(dict.fromkeys(of for own in slices for of in [own, *map(own.without, own.terms)]))
    count = search.config.counterfactuals
    drawn = search.run("pairs", [(of, count) for of in every], confirming=True, paired=True)
    failed, first = (
        {of: column[k * count : (k + 1) * count] for k, of in enumerate(every)}
        for column in (drawn.failed[OWN], tries_of(drawn.dataset) == 1)
    )
    for finding, own in zip(findings, slices, strict=True):
        finding["counterfactuals"] = []
        for term in own.terms:
            other = own.without(term)
            same = first[own] & first[other]  # of the same noise
            only = np.flatnonzero(same & failed[own] & ~failed[other])
            back = int((same & failed[other] & ~failed[own]).sum())
            finding["counterfactuals"].append({
                "term": term.name,
                "rate": Rate(int(failed[own][same].sum()), int(same.sum())).described(),
                "rate_without": Rate(int(failed[other][same].sum()), int(same.sum())).described(),
                "only_with": len(only),
                "only_without": back,
                "p": sign_test(len(only), back, "greater"),
                "dataset": drawn.dataset.uri,
                "pairs": [[every.index(of) * count + int(i) for of in (own, other)] for i in only[:SHOWN]],
            })  # fmt: skip


def scaled_up(search: Search, slices: list[Slice]) -> dict[str, Any]:
    """Further images of the slices, their failures as a dataset, and how many of them other classifiers fail on too."""
    config = search.config
    stage = search.run("scale", shared(slices, config.scale_up), confirming=True, once=True)
    failures = np.flatnonzero(stage.failed[OWN])
    found: dict[str, Any] = {"images": len(stage.slices), "failures": len(failures)}
    if not len(failures):
        return found
    found["dataset"] = _adversarial(config, stage, failures, search.bench.classifiers[OWN].classes)
    found["transfer"] = {
        name: {
            "drawn": Rate(int(failed.sum()), len(failed)).described(),
            "adversarial": Rate(int(failed[failures].sum()), len(failures)).described(),
        }
        for name, failed in stage.failed.items()
    }
    found["slices"] = {
        of.name: Rate(int(stage.failed[OWN][at].sum()), len(at)).described()
        for of in slices
        if len(at := np.flatnonzero([s == of for s in stage.slices]))
    }
    return found


def _adversarial(config: DiscoverConfig, stage: Results, failures: np.ndarray, own: Sequence[str]) -> str:
    """Write the failures among a stage's images; returns the dataset's place. Their labels are numbered as the classifier's
    classes, if all of them are such, so that they can be mixed with what it has learned from."""
    header = stage.dataset.header
    classes = own if set(header.classes) <= set(own) else header.classes
    fields = {name: f for name, f in header.fields.items() if name != FEATURE}
    said = {n: v for n, v in header.provenance.items() if n not in ("slices", "rows")}
    planned = Header(
        name=f"failures of {config.classifier.model}",
        fields=fields,
        num_samples=len(failures),
        shard_size=config.shard_size,
        classes=tuple(classes),
        provenance={**said, "scaled_from": stage.dataset.uri, "manifest_of": stage.dataset.manifest_hash(),
                    "slices": [cell for cell, _ in header.provenance["slices"]]},
    )  # fmt: skip
    dataset, reader = Dataset.create(f"{config.out}/adversarial", planned), Reader(stage.dataset, list(fields))
    for shard in range(planned.num_shards):
        if dataset.record(shard) is not None:
            continue
        began, span = time.time(), planned.shard_range(shard)
        columns = reader.gather(failures[span.start : span.stop])
        arrays = [name for name, f in fields.items() if f.array]
        columns["label"] = np.array([classes.index(header.classes[i]) for i in columns["label"]])
        values = {n: columns[n] if n in arrays else columns[n].tolist() for n in fields}
        samples = [{"key": f"{i:08d}", **{n: v[k] for n, v in values.items()}} for k, i in enumerate(columns["index"])]
        commit_shard(dataset, shard, samples, "discovery", time.time() - began)
    return dataset.uri


def _manifest(dataset: Dataset) -> dict[str, Any]:
    return {"dataset": dataset.uri, "images": dataset.header.num_samples, "manifest": dataset.manifest_hash()}
