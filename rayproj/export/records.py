"""Model cards and data cards from what a run or a dataset recorded: `rayproj card URI --to FILE`.

Sections are those of Mitchell et al. 2019 ("Model Cards for Model Reporting") and of Gebru et al. 2021 ("Datasheets for
Datasets"), with the front matter that the Hugging Face hub reads. What no record holds is said to be not recorded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rayproj.curation.curate import REJECTED
from rayproj.data.cells import cells_of
from rayproj.data.dataset import WEIGHTS, Dataset, Header
from rayproj.diffusion.conditions import LABEL
from rayproj.engine.checkpoint import Commit, commits
from rayproj.errors import UserError
from rayproj.export.card import describe, guarantee, guarantees, last_part, no_guarantee, without_paths
from rayproj.export.evaluations import NOT_RECORDED, Evaluation, OfJudge, evaluation_of, header_of, table, words
from rayproj.judging.scoring import JudgeConfig
from rayproj.responsibility.provenance import OF_DATASET
from rayproj.storage.store import Store, from_json
from rayproj.synthesis.gate import withheld
from rayproj.synthesis.plan import PROMPT, commit_hash

KINDS = {"diffusion": "image-generation", "classifier": "image-classification", "autoencoder": "autoencoder"}
CELLS = 200  # that a card lists
# Upper ends of the hub's size categories.
SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]


def card(uri: str, evaluations: Sequence[str] = (), judged: tuple[JudgeConfig, dict[str, Any]] | None = None) -> str:
    """The card of a run or of a dataset.

    Args:
        evaluations: run dirs of jobs/evaluate.py or jobs/judge.py that judged the model.
        judged: what a judgement that is not written yet was told and has found.

    Raises:
        UserError: there is neither a training's run nor a dataset, or an evaluation is none of it.
    """
    store = Store(uri)
    if store.exists("dataset.json"):
        return data_card(Dataset.open(uri))
    if store.exists("config.yaml"):
        told = [OfJudge.of(*judged, store)] if judged else []
        return model_card(store, evaluations, [one for one in told if one.names])
    raise UserError(f"There is neither a run nor a dataset at '{uri}'; check the path.")


def write_card(uri: str, to: str, evaluations: Sequence[str] = ()) -> Path:
    """Write the card of a run or of a dataset to a file.

    Raises:
        UserError: as `card`, or the file is taken.
    """
    text, file = card(uri, evaluations), Path(to)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"'{to}' is there already; give --to another name, or delete it.") from None
    except OSError as error:
        raise UserError(f"'{to}' cannot be written ({error}); give --to another place.") from error
    return file


def _document(front: dict[str, Any], title: str, sections: dict[str, Iterable[str]]) -> str:
    head = OmegaConf.to_yaml(OmegaConf.create(front)).strip()
    parts = [f"---\n{head}\n---", f"# {title}"]
    for name, lines in sections.items():
        body = "\n".join(lines).strip()
        parts.append(f"## {name}\n\n{body or NOT_RECORDED.capitalize() + '.'}")
    return "\n\n".join(parts) + "\n"


def _listed(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


# Models


def model_card(run: Store, evaluations: Sequence[str] = (), more: Sequence[Evaluation] = ()) -> str:
    """The card of a training's run.

    Args:
        evaluations: run dirs of jobs/evaluate.py or jobs/judge.py that judged the model.
        more: evaluations that are at hand already.

    Raises:
        UserError: its job trains no model, or it has no commit yet.
    """
    text = run.read("config.yaml")
    values: Any = OmegaConf.to_container(OmegaConf.create(text.decode()))
    kind = next((name for name in KINDS if isinstance(values.get(name), dict)), None)
    if kind is None:
        raise UserError(f"The run '{run.uri}' is of a job that trains no model; give the run dir of a training.")
    if not (done := commits(run)):
        raise UserError(f"The run '{run.uri}' has no committed checkpoint yet; train it first.")
    header = header_of(values["diffusion"]["latents"] if kind == "diffusion" else values["data"])
    judged = [*(evaluation_of(uri, run, kind) for uri in evaluations), *more]
    tests = [d for one in judged for d in one.tests]
    front = {
        "library_name": "pytorch",
        "tags": [KINDS[kind], "rayproj", *(["synthetic-data"] if kind == "diffusion" else [])],
        **({"datasets": [header.name]} if header else {}),
    }
    sections: dict[str, Iterable[str]] = {
        "Model details": _details(run, values, done[-1], kind),
        "Intended use": ["Not recorded: no run knows what its model is for. State it before you publish."],
        "Factors": _listed(dict.fromkeys(line for one in judged for line in one.factors())),
        "Metrics": _listed(dict.fromkeys(line for one in judged for line in one.metrics())),
        "Evaluation data": _listed(dict.fromkeys(tests)),
        "Training data": _training_data(values, header, kind),
        "Quantitative analyses": [line for one in judged for line in one.tables()],
        "Ethical considerations": _listed(_ethics(run, header, kind)),
        "Caveats and recommendations": _listed(_caveats(judged, header)),
        "Config": ["Of a path, the last part.", "", "```yaml", _config(values), "```"],
    }
    return _document(front, last_part(run.uri), sections)


def _config(values: dict[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if name not in ("run", "cluster", "tracking")}
    return OmegaConf.to_yaml(OmegaConf.create(without_paths(shown))).strip()


def _details(run: Store, values: dict[str, Any], commit: Commit, kind: str) -> list[str]:
    job = from_json(run.read("run.json")) if run.exists("run.json") else {}
    result = from_json(run.read("result.json")) if run.exists("result.json") else {}
    network = values[kind].get("denoiser", values[kind]).get("network")
    rows = [
        ("kind", f"{kind}{f', {network}' if network else ''}"),
        ("run", f"`{last_part(run.uri)}`"),
        ("job", job.get("job")),
        ("begun", _date(job.get("created_at"))),
        ("finished", _date(result["finished_at"]) if result else "no"),
        ("code", f"rayproj {job['version']}, revision {job.get('revision') or NOT_RECORDED}" if job else None),
        ("checkpoint", f"step {commit.step} of {values['train']['steps']}, committed {_date(commit.committed_at)}"),
        ("commit", f"`{commit_hash(commit)}` (SHA-256 over the records of the checkpoint's files)"),
        ("parameters", result.get("parameters")),
        ("examples seen", result.get("samples_seen")),
        ("hours of training", result["seconds"] / 3600 if result else None),
        ("trained on", f"{result['ranks']} x {result['device']}" if "ranks" in result else None),
        ("licence of the model", None),
    ]
    return table(["", ""], rows)


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _training_data(values: dict[str, Any], header: Header | None, kind: str) -> list[str]:
    if header is None:
        return []
    lines = [describe(header, kind.capitalize()), *_origin(header)]
    if values.get("mix"):
        lines += [f"mixed in, {share:g} of every batch: `{last_part(uri)}`" for uri, share in values["mix"].items()]
    return _listed(lines)


def _ethics(run: Store, header: Header | None, kind: str) -> list[str]:
    data = header.name if header else "its training data"
    if kind == "diffusion":
        found = guarantees(run, data)
    elif made := (header.provenance if header else {}).get("private"):
        found = [guarantee(made, "the private data of the model that drew its images")]
    else:
        found = [no_guarantee(data)]
    return [f"Differential privacy: {line}" for line in found]


def _caveats(judged: Sequence[Evaluation], header: Header | None) -> list[str]:
    """Measured ones alone."""
    lines = [line for one in judged for line in one.caveats()]
    if not judged:
        lines.append("No evaluation was given, so nothing is said of how good the model is.")
    if header and not (header.licence or header.attribution):
        lines.append("The licence of the training data is not recorded.")
    return lines


# Datasets


def data_card(dataset: Dataset) -> str:
    """The card of a dataset, complete or still being written."""
    header, said = dataset.header, dataset.header.provenance
    records = dataset.records()
    synthetic = "model" in said
    size = next((name for bound, name in SIZES if header.num_samples < bound), "n>10M")
    tags = ["rayproj", "webdataset", *(["synthetic"] if synthetic else [])]
    front = {"pretty_name": header.name, "size_categories": [size], "tags": tags}
    fields = [(name, f"{f.encoding} {'x'.join(map(str, f.shape))}".strip(), ", ".join(f.values[:12]) or "-")
              for name, f in header.fields.items()]  # fmt: skip
    whole = (
        dataset.manifest_hash() if dataset.complete else f"{NOT_RECORDED}: {len(records)} of {header.num_shards} shards"
    )
    composition = table(["", ""], [
        ("samples", header.num_samples), ("shards", header.num_shards), ("bytes", sum(r.size for r in records.values())),
        ("manifest (SHA-256 over the header and the shards' hashes)", whole),
        ("signed", "yes, provenance.json" if dataset.store.exists(OF_DATASET) else "no"),
        ("weights", "weights.npy: how often each is to be drawn" if dataset.store.exists(WEIGHTS) else "all alike"),
    ])  # fmt: skip
    sections: dict[str, Iterable[str]] = {
        "Motivation": ["Not recorded: no run knows what its data are for. State it before you publish."],
        "Composition": [*composition, *table(["field", "form", "values"], fields), *_counts(dataset)],
        "Collection process": _listed(_origin(header)),
        "Preprocessing and filters": _listed(_filters(dataset)),
        "Splits": _listed(_splits(said)),
        "Uses": _listed(_uses(said)),
        "Distribution": _listed([
            f"licence: {header.licence or NOT_RECORDED}", f"attribution: {header.attribution or NOT_RECORDED}",
        ]),
        "Privacy": _listed(_privacy(said, synthetic)),
        "Maintenance": ["Not recorded."],
    }  # fmt: skip
    return _document(front, header.name, sections)


def _origin(header: Header) -> list[str]:
    said = header.provenance
    names = (
        *("source", "part", "model", "model_commit", "model_step", "weak", "weak_commit", "autoencoder_commit", "seed"),
        *("ema", "images", "curated_from", "upscaled_from", "obfuscated_from", "indexed", "plan"),
    )
    found = [f"{words(name)}: {last_part(str(said[name]))}" for name in names if said.get(name) not in (None, "", 0.0)]
    if said.get("sampler"):
        found.append("sampler: " + ", ".join(f"{name}={value}" for name, value in said["sampler"].items()))
    return found


def _counts(dataset: Dataset) -> list[str]:
    """Samples by class, property and prompt together, as far as there are few of them."""
    header = dataset.header
    axes = [name for name in (dict(header.provenance.get("axes", [])) or [LABEL]) if name in header.fields]
    if not dataset.complete or not axes:
        return []
    if axes == [LABEL]:
        counts = Counter[str]()
        for record in dataset.records().values():
            counts.update(record.class_counts)
        rows: list[tuple[str, int]] = [(name, counts[name]) for name in header.classes]
        if dataset.without_label:
            rows.append(("no class", dataset.without_label))
    else:
        cells = cells_of([dataset], axes)
        rows = [(name, int(count)) for name, count in zip(cells.names, cells.counts, strict=True)]
    heads = [" × ".join("prompt" if name == PROMPT else name for name in axes), "samples"]
    more = [f"And {len(rows) - CELLS:,} more.", ""] if len(rows) > CELLS else []
    return table(heads, rows[:CELLS]) + more


def _filters(dataset: Dataset) -> list[str]:
    said, lines = dataset.header.provenance, []
    if "rules" in said:
        reasons = Counter[str]()
        rejected = dataset.store.read(REJECTED).splitlines() if dataset.store.exists(REJECTED) else []
        for line in rejected:
            reasons.update(list(json.loads(line)["reasons"]))
        lines.append(f"{len(rejected):,} samples were left out by rules (one may break several):")
        for name, rule in said["rules"].items():
            bounds = [f"{k} {rule[k]:g}" for k in ("at_least", "at_most") if rule[k] is not None]
            lines.append(f"{name}: {rule['scorer']} {', '.join(bounds)}: {reasons[name]:,}")
        if "duplicate" in reasons:
            lines.append(f"duplicate: {reasons['duplicate']:,}")
    for name in ("skipped", "left_out"):
        if broken := sum(map(len, said.get(name, {}).values())):
            lines.append(f"left out as broken: {broken:,}")
    if "policy" in said:
        decisions = ", ".join(f"{what}: {count:,}" for what, count in said["policy"]["decisions"].items())
        lines.append(f"prompts were judged by the policy {said['policy']['rules']}: {decisions}")
    if "safety" in said:
        found = withheld(dataset)
        reasons_of = ", ".join(f"{name}: {count:,}" for name, count in found["reasons"].items())
        lines.append(
            f"{found['images']:,} drawn images did not pass the safety rules and were drawn anew"
            + (f": {reasons_of}" if reasons_of else "")
        )
    if "watermark" in said:
        mark = said["watermark"]
        lines.append(f"every image bears the watermark of the key {mark['key']}, strength {mark['strength']:g} of 255")
    return lines


def _splits(said: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {share:g} of the source" for name, share in (said.get("fractions") or {}).items()]
    if said.get("part"):
        lines.append(f"this one is '{said['part']}'")
    return lines + [f"kept by the rule {rule}" for rule in said.get("keep", [])]


def _uses(said: dict[str, Any]) -> list[str]:
    made = "the images are made by a model; of whom or what they seem to show nothing is claimed"
    return [made] if "model" in said else []


def _privacy(said: dict[str, Any], synthetic: bool) -> list[str]:
    if "private" not in said:
        return [] if synthetic else ["None: these are the images themselves."]
    data = f"the private data of the model `{last_part(str(said['model']))}`"
    if not said["private"]:
        return [f"None: by its config the model `{last_part(str(said['model']))}` saw no private data."]
    return [guarantee(said["private"], data), f"digest of the ledger: {said['private']['ledger']}"]
