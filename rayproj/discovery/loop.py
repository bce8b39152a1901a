"""The search: look at images, propose slices, look closer, and confirm on other images what stands out.

    look-1       images of every label, over all combinations of the attributes
    closer-2     images of the slices that seem to fail more, and of those slices without one of their terms; where none
                 does, look-2: more images of every label
    confirm      other images of the slices proposed by then, and of their labels as such: the only ones that are tested; in
                 several looks, of which the later ones draw no more of what is a finding already
    scale        if asked for: many images of the slices that were confirmed; where there are quotas, scale-1, scale-2, ...,
                 each for those that are not full
    adversarial  of these, the failures, or as many as the quotas say
    pairs        if asked for: images of the slices that were confirmed, and of these slices without one of their terms, from
                 the same random numbers
    by-NAME      if asked for: images of these slices and their labels by another generator, or of real images

A stage is a dataset of committed shards, planned as a pure function of the config and of the stages before, so a search that
was stopped anywhere goes on, and ends with the same findings.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from rayproj.data.dataset import Dataset
from rayproj.discovery.adversarial import scaled_up
from rayproj.discovery.clusters import clusters, stability
from rayproj.discovery.examine import OWN, Bench, Results, tries_of
from rayproj.discovery.generators import prompt_of
from rayproj.discovery.propose import Looked, Proposal, propose
from rayproj.discovery.search import DiscoverConfig, Make, ReplicationConfig, Search, joined, prepared, shared
from rayproj.discovery.slices import Slice, Term
from rayproj.errors import UserError
from rayproj.evaluation.proportions import Rate, adjusted, detectable, higher, ratio, sign_test
from rayproj.responsibility.safety import SafetyConfig

SHOWN, CLOSEST = 12, 6  # images of a finding, and of a cluster of failures, that are named


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
    rules = SafetyConfig() if config.generator.images else search.config.safety  # what is there cannot be drawn anew
    own = dataclasses.replace(
        search.config, generator=config.generator, attributes=attributes, words=False, safety=rules
    )
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


def _manifest(dataset: Dataset) -> dict[str, Any]:
    return {"dataset": dataset.uri, "images": dataset.header.num_samples, "manifest": dataset.manifest_hash()}
