"""What was recorded when the judged images were made: what the prompt policy decided and the safety filter withheld, whose
provenance verifies, and how the playground did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayproj.data.dataset import Dataset
from rayproj.errors import UserError
from rayproj.evaluation.proportions import Rate
from rayproj.responsibility.load import Load
from rayproj.responsibility.policy import Action
from rayproj.responsibility.provenance import KINDS, SIDECAR, Verdict, check, has_manifest, need_c2pa
from rayproj.storage.store import Store, from_json
from rayproj.synthesis.gate import withheld

NAMED = 12  # of what is wrong


@dataclass
class ServedConfig:
    """Where the records of a playground are."""

    run: str = ""  # run dir of jobs/serve_playground.py: what it blocked, rewrote and withheld
    loads: list[str] = field(default_factory=list)  # files of `rayproj playground load URL --to FILE`


def decided(uri: str) -> dict[str, Any] | None:
    """What the policy said of the prompts of a dataset; None where none was asked.

    Returns:
        Action -> number of prompts; "rules": [{action, rule, reason, prompts}] of what was not simply allowed. A reason is
        "" where the dataset was written before they were kept.
    """
    said = Dataset.open(uri).header.provenance.get("policy")
    if said is None:
        return None
    counts, rules = dict.fromkeys((action.value for action in Action), 0), []
    for told, prompts in said["decisions"].items():
        action, _, rule = told.partition(" ")
        counts[action] += prompts
        if rule:
            reason = said.get("reasons", {}).get(told, "")
            rules.append({"action": action, "rule": rule, "reason": reason, "prompts": prompts})
    return {**counts, "rules": rules}


def filtered(uri: str) -> dict[str, Any] | None:
    """How many of the images that were drawn for a dataset its safety rules withheld, with the exact 95 % interval of their
    share, and how many each rule was against; None where there was none."""
    dataset = Dataset.open(uri)
    if "safety" not in dataset.header.provenance:
        return None
    found = withheld(dataset)
    recorded = found["reasons"] or not found["images"]
    rules = dataset.header.provenance["safety"]["rules"] if recorded else ()
    reasons = {name: found["reasons"].get(name, 0) for name in rules}
    rate = Rate(found["images"], found["images"] + dataset.header.num_samples)
    return {"count": rate.failures, "of": rate.images, **rate.share(), "reasons": reasons}


def verified(sets: Mapping[str, str], folder: str = "", trust: str = "") -> dict[str, Any]:
    """Whose provenance verifies.

    Args:
        sets: name -> dataset.
        folder: of image files.
        trust: as of `provenance.check`.

    Returns:
        "sets": name -> {form, signer, trusted, sound, problems, images}; "images": of all sets together, how many are in one
        that verifies; "files": form -> {sound, of}, and "wrong": a sentence on each of the first files that do not verify.

    Raises:
        UserError: the folder has no image, or nothing here reads its manifests.
    """
    told = {name: _of_set(uri, trust) for name, uri in sets.items()}
    sound = sum(one["images"] for one in told.values() if one["sound"])
    files, wrong = _of_files(folder, trust) if folder else ({}, [])
    images = {"sound": sound, "of": sum(one["images"] for one in told.values())}
    return {"trust": bool(trust), "sets": told, "images": images, "files": files, "wrong": wrong}


def images_of(folder: str) -> list[Path]:
    """The image files of a folder and those below, in order.

    Raises:
        UserError: there is none.
    """
    found = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower().removeprefix(".") in KINDS)
    if not found:
        raise UserError(f"There is no image in judge.signed='{folder}'; give a folder of {', '.join(KINDS)} files.")
    return found


def need_reader(folder: str) -> None:
    """Make sure that the provenance of every image of a folder can be read.

    Raises:
        UserError: there is no image, or one without a sidecar and nothing here reads manifests.
    """
    for file in images_of(folder):
        bare = not Path(f"{file}{SIDECAR}").exists()
        if bare or has_manifest(file.read_bytes()):
            need_c2pa(f"judge.signed: '{file}' has {'no sidecar' if bare else 'a manifest'}. ")


def _of_set(uri: str, trust: str) -> dict[str, Any]:
    verdict = check(uri, trust)
    said = {name: getattr(verdict, name) for name in ("form", "signer", "trusted", "sound")}
    return {**said, "problems": list(verdict.problems[:NAMED]), "images": Dataset.open(uri).header.num_samples}


def _of_files(folder: str, trust: str) -> tuple[dict[str, Any], list[str]]:
    verdicts = [(file.name, check(str(file), trust)) for file in images_of(folder)]
    forms: dict[str, list[bool]] = defaultdict(list)
    for _, verdict in verdicts:
        forms[verdict.form].append(verdict.sound)
    wrong = [f"{name}: {_wrong(verdict)}" for name, verdict in verdicts if not verdict.sound]
    return {form: {"sound": sum(sound), "of": len(sound)} for form, sound in sorted(forms.items())}, wrong[:NAMED]


def _wrong(verdict: Verdict) -> str:
    return "; ".join(verdict.problems) or f"{verdict.signer} is not trusted"


def served(config: ServedConfig) -> dict[str, Any] | None:
    """What a playground recorded; None where nothing is configured.

    Returns:
        "decisions": [{action, rule, reason, count}], the commonest first, None without a run; a playground records prompts
        that were not simply allowed, and images that its safety rules withheld. "loads": of `Load.described`.

    Raises:
        UserError: there is no such run or file.
    """
    if not config.run and not config.loads:
        return None
    loads = [Load.read(file).described() for file in config.loads]
    return {"decisions": _decisions(config.run) if config.run else None, "loads": loads}


def _decisions(run: str) -> list[dict[str, Any]]:
    store, names = Store(run), ("action", "rule", "reason")
    if not store.exists("run.json"):
        raise UserError(
            f"There is no run at judge.playground.run='{run}'; give the run dir of jobs/serve_playground.py."
        )
    with ThreadPoolExecutor(16) as threads:
        records = list(threads.map(lambda path: from_json(store.read(path)), store.list("decisions")))
    counts = Counter[tuple[str, ...]]()
    for record in records:  # of many together, how many they were
        counts[tuple(record[name] for name in names)] += record.get("count", 1)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{**dict(zip(names, said, strict=True)), "count": count} for said, count in ordered]
