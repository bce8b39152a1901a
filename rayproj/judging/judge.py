"""From the scores of all images to what is said of the models."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.proportions import adjusted
from rayproj.evaluation.quality import limit_takes, quality
from rayproj.evaluation.watermark import MARKED, read_key, survivals
from rayproj.judging import extraction, outputs, paired, people, perception, records
from rayproj.judging.prompts import categories
from rayproj.judging.redteam import red_team
from rayproj.judging.scoring import FEATURE, SECOND, JudgeConfig, Scores, texts
from rayproj.responsibility.policy import PromptPolicy
from rayproj.responsibility.provenance import read_anchors


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Alignment by measure, model and category; the models compared; what people prefer, and the measures against them;
    quality over each extractor; perceived attributes, and how often their classifiers are right; attempts at extraction;
    what the policy and the safety filter did; whose provenance verifies; what the watermark survives; the playground under
    load.

    Raises:
        UserError: the models were not given the same prompts, or what others recorded cannot be read.
    """
    scores = {name: Scores.read(f"{config.out}/scores/{name}") for name in config.sets()}
    models = {name: scores[name] for name in config.models}
    prompts = _same_prompts(models)
    named, shares = list(next(iter(models.values())).measures), next(iter(models.values())).shares
    each = min(len(found.columns["prompt"]) for found in models.values()) / len(prompts)
    table = {m: {name: _of_prompts(found, m, prompts) for name, found in models.items()} for m in named}
    compared = _compared(table)
    orders = {m: {(row["first"], row["second"]): row["order"] for row in rows} for m, rows in compared.items()}
    study, human = people.asked(config, prompts)
    confusion = {
        attribute: perception.confusion(
            config.attributes[attribute], uri, config.labelled_group, config.samples, config.batch
        )
        for attribute, uri in config.labelled.items()
    }
    drawn = {**config.models, **config.attempts}
    category = dict(zip(map(str, models[next(iter(models))].columns["prompt"]),
                        map(str, models[next(iter(models))].columns["category"]), strict=True))  # fmt: skip
    return {
        "prompts": len(prompts),
        "images": {name: len(found.columns["prompt"]) for name, found in scores.items()},
        "guidance": {name: found.guidance for name, found in models.items()},
        "alignment": {
            m: _alignment(of, [category[prompt] for prompt in prompts], each if m in shares else None)
            for m, of in table.items()
        },
        "real": {
            m: paired.mean_interval(v, images=1 if m in shares else None)
            for m, v in scores["reference"].measures.items()
        }
        if config.reference
        else {},
        "compared": compared,
        "people": study,
        "agreement": paired.agreement(orders, human) if human else None,
        "quality": _quality(config, scores) if config.reference else {},
        "attributes": {
            attribute: {name: _outputs(config, found, attribute, confusion) for name, found in models.items()}
            for attribute in config.attributes
        },
        "perception": {
            attribute: perception.described(tables, next(iter(models.values())).attributes[attribute])
            for attribute, tables in confusion.items()
        },
        "policy": {name: found for name, uri in drawn.items() if (found := records.decided(uri))},
        "safety": {name: found for name, uri in drawn.items() if (found := records.filtered(uri))},
        "provenance": records.verified(drawn, config.signed, config.trust),
        "red_team": _red_team(config, scores) if config.adversarial else None,
        "extraction": {name: _attempts(config, scores[name]) for name in config.attempts},
        "watermark": _watermark(config) if config.watermark_key else None,
        "playground": records.served(config.playground),
    }


def check(config: JudgeConfig) -> None:
    """Read what others recorded, so that what is wrong with it is said before the work is done and not after.

    Raises:
        UserError: the key, ratings, certificates, signed or labelled images or the playground's records are not there or are
            none.
    """
    if config.watermark_key:
        read_key(config.watermark_key)
    people.asked(config, texts(config, next(iter(config.models))) if config.human else ())
    read_anchors(config.trust)
    if config.signed:
        records.need_reader(config.signed)
    records.served(config.playground)
    for attribute, uri in config.labelled.items():
        perception.opened(config.attributes[attribute], uri)


def _same_prompts(models: dict[str, Scores]) -> list[str]:
    """In their order."""
    first_name, first = next(iter(models.items()))
    prompts = list(dict.fromkeys(map(str, first.columns["prompt"])))
    for name, found in models.items():
        if {*map(str, found.columns["prompt"])} != {*prompts}:
            raise UserError(
                f"The images of '{name}' are of other prompts than those of '{first_name}'; draw the same ones."
            )
    return prompts


def _of_prompts(found: Scores, measure: str, prompts: list[str]) -> np.ndarray:
    of = found.by_prompt(measure)
    return np.array([of[prompt] for prompt in prompts])


def _compared(table: dict[str, dict[str, np.ndarray]]) -> dict[str, list[dict[str, Any]]]:
    """Measure -> every pair of models. With p is q, adjusted for that there are so many tests; orders are by p, as in Imagen
    3's report."""
    found = {
        m: [{"first": a, "second": b, **paired.compared(of[a], of[b])} for a, b in combinations(of, 2)]
        for m, of in table.items()
    }
    rows = [row for of in found.values() for row in of]
    for row, q in zip(rows, adjusted([row["p"] for row in rows]), strict=True):
        row["q"] = q
    return found


def _alignment(
    scores: dict[str, np.ndarray], category: list[str], images: float | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each model over all prompts, and over those of each category of which the measure says something.

    Args:
        images: as of `paired.mean_interval`.
    """
    of = np.array(category)
    places = {"all": np.ones(len(of), bool), **{name: of == name for name in sorted({*of} - {""})}}
    told = [name for name, at in places.items() if any(np.isfinite(v[at]).any() for v in scores.values())] or ["all"]
    return {
        model: {name: paired.mean_interval(v[places[name]], images=images) for name in told}
        for model, v in scores.items()
    }


def _quality(config: JudgeConfig, scores: dict[str, Scores]) -> dict[str, Any]:
    """Extractor -> model -> all measures of quality, at as many images as the smallest set has."""
    extractors = {
        "EfficientNet-lite0": FEATURE,
        **({config.extractor.rstrip("/").rpartition("/")[2]: SECOND} if config.extractor else {}),
    }
    real = scores["reference"].columns
    count = min(len(scores[name].columns["prompt"]) for name in [*config.models, "reference"])
    return {
        title: {
            "samples": count,
            "limit_takes": limit_takes(real[f].shape[1]),
            "models": {
                name: quality(_some(real[f], count), _some(scores[name].columns[f], count)) for name in config.models
            },
        }
        for title, f in extractors.items()
    }


def _some(features: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    return features[np.sort(np.random.default_rng(seed).permutation(len(features))[:count])]


def _outputs(config: JudgeConfig, found: Scores, attribute: str, confusion: dict[str, np.ndarray]) -> dict[str, Any]:
    columns = found.columns
    here = columns["category"] == config.people if config.people else np.ones(len(columns["prompt"]), bool)
    if not here.any():
        raise UserError(
            f"No prompt is of the category '{config.people}' (judge.people), which judge.attributes are of."
        )
    kind, prompt = columns[f"attribute_{attribute}"][here], columns["prompt"][here].astype(str)
    told = outputs.outputs(kind, prompt, found.attributes[attribute])
    known = perception.adjusted(kind, prompt, confusion[attribute]) if attribute in confusion else None
    return {**told, "adjusted": known and dict(zip(found.attributes[attribute], known, strict=True))}


def _red_team(config: JudgeConfig, scores: dict[str, Scores]) -> dict[str, Any]:
    """The captions of real images are those that should pass. The prompts that were drawn tell nothing of false alarms: the
    policy had let them through before."""
    harmless = dict.fromkeys(map(str, scores["reference"].columns["prompt"])) if config.reference else ()
    harmful = categories(config.adversarial, "judge.adversarial")
    return red_team(PromptPolicy(config.policy), harmful, list(harmless))


def _watermark(config: JudgeConfig) -> dict[str, Any]:
    return survivals(config.models, config.reference, read_key(config.watermark_key), min(MARKED, config.samples))


def _attempts(config: JudgeConfig, found: Scores) -> dict[str, Any]:
    columns = found.columns
    train = Dataset.open(config.learned_from)
    captions = Reader(train, [config.captions]).gather(np.arange(train.header.num_samples))[config.captions].astype(str)
    prompt = columns["prompt"].astype(str)
    return extraction.attempts(prompt, columns["nearest_ratio"], captions[columns["nearest"]] == prompt)
