"""What a search for failures found: failures.html, a section for each finding, failures.json for issue trackers, and
predictions.parquet for SkewSize."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.discovery.examine import OWN, slices_of
from rayproj.discovery.slices import Slice
from rayproj.report.pages import picture_uri, rendered

SIDE = 96  # of an image on the page, in pixels
CLUSTERS = 12  # of failures on the page


def issues(found: dict[str, Any]) -> dict[str, Any]:
    """failures.json: an issue for each finding with "title", "body" in Markdown, "labels" and "statistics"; and the whole
    search.

    Args:
        found: what `rayproj.discovery.loop.discover` returned.
    """
    return {"issues": [_issue(finding, found) for finding in found["findings"]], "search": found}


def title(finding: dict[str, Any]) -> str:
    """A finding in one line."""
    label = finding["label"]
    where = " and ".join(term.name for term in Slice.from_json(finding["slice"]).terms)
    if finding["by_any_class"]:
        said, times = f"misclassified, mostly as {finding['wrong']}", finding["ratio"]["value"]
    else:
        said, times = f"taken for {finding['wrong']}", finding["ratio_as"]["value"]
    more = f"{times:.1f} times as often as {label} as such" if times else f"which {label} as such never is"
    return f"{label} with {where} is {said}, {more}"


def _issue(finding: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    own, base = finding["rate"], finding["base_rate"]
    confused = ", ".join(f"{name} {count}" for name, count in finding["confused"].items())
    lines = [
        f"Of {own['images']} images of **{finding['name']}** the classifier `{found['classifier']}` fails on "
        f"{_percent(own)}; of {base['images']} images of {finding['label']} as such, on {_percent(base)}.",
        "",
        f"- ratio: {_ratio(finding['ratio'])}",
        f"- one-sided Fisher test: p = {finding['p']:.3g}; q = {finding['q']:.3g} over {finding['hypotheses']} hypotheses "
        "(Benjamini and Hochberg)",
        f"- answers: {confused}",
        f"- drawn by: `{finding['prompt']}`",
        *(
            f"- images: `{uri}`, samples {', '.join(map(str, ids))}"
            for uri, ids in _by_dataset(finding["failures"]).items()
        ),
    ]
    if "p_as" in finding:
        rates = f"{_percent(finding['rate_as'])} against {_percent(finding['base_rate_as'])}"
        lines.insert(4, f"- as {finding['wrong']}: {rates}, p = {finding['p_as']:.3g}, q = {finding['q_as']:.3g}")
    for pair in finding.get("counterfactuals", []):
        lines.append(
            f"- the same {pair['rate']['images']} pictures without {pair['term']}: fails on "
            f"{_percent(pair['rate_without'])} instead of {_percent(pair['rate'])}; {pair['only_with']} fail only with it, "
            f"{pair['only_without']} only without (McNemar's exact test, one-sided: p = {pair['p']:.3g})"
        )
    for name, again in finding.get("replications", {}).items():
        if again["replicated"] is None:
            lines.append(f"- on images of {name}: not tested, there are none of this")
            continue
        lines.append(
            f"- on images of {name}: {_percent(again['rate'])} of {again['rate']['images']} against "
            f"{_percent(again['base_rate'])} of {again['base_rate']['images']}, q = {again['q']:.3g}: "
            f"{'replicated' if again['replicated'] else 'not replicated'}"
        )
    for name, other in finding["others"].items():
        lines.append(f"- {name} fails on {_percent(other['slice'])}, and elsewhere on {_percent(other['base'])}")
    kept = ("rate", "base_rate", "ratio", "rate_as", "base_rate_as", "ratio_as", "p", "q", "p_as", "q_as", "hypotheses")
    return {
        "title": title(finding),
        "body": "\n".join(lines),
        "labels": ["model-failure", finding["label"], finding["wrong"]],
        "statistics": {name: finding[name] for name in kept if name in finding},
    }


def predictions(found: dict[str, Any]) -> bytes:
    """predictions.parquet, as `rayproj evaluate skewsize` takes it: of each image of the first looks, which are over all
    combinations of the attributes alike, "label", "prediction" and the value of each attribute that was asked for."""
    tables = []
    for name, stage in found["stages"].items():
        if name.startswith("look"):
            dataset = Dataset.open(stage["dataset"])
            header, asked = dataset.header, slices_of(dataset.header)
            columns = Reader(dataset, ["label", f"predicted_{OWN}"]).gather(np.arange(header.num_samples))
            known = header.values_of(f"predicted_{OWN}")
            attributes = header.provenance["examine"]["attributes"]
            said = {attribute: [of.values.get(attribute, "") for of in asked] for attribute in attributes}
            said["label"] = [header.classes[i] for i in columns["label"]]
            said["prediction"] = [known[i] for i in columns[f"predicted_{OWN}"]]
            tables.append(pa.table({name: pa.array(texts, pa.string()) for name, texts in said.items()}))
    sink = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), sink)
    return sink.getvalue()


def page(found: dict[str, Any]) -> str:
    """failures.html as text that needs no other file."""
    filters: dict[str, Any] = {"percent": _percent, "ratio": _ratio, "title": title}
    pictures = {finding["name"]: _pictures(finding) for finding in found["findings"]}
    groups = [_shown(one["shown"]) for one in found["clusters"][:CLUSTERS]]
    shown = list(zip(found["clusters"], groups, strict=False))
    return rendered("failures.html", filters, found=found, pictures=pictures, clusters=shown, side=SIDE)


def _pictures(finding: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The images that fail and those that do not, each with the answer and how sure it is; and by term the pairs with and
    without it, one after the other."""
    shown = {kind: _shown(finding[kind]) for kind in ("failures", "right")}
    for pair in finding.get("counterfactuals", []):
        shown[pair["term"]] = _shown([[pair["dataset"], i] for both in pair["pairs"] for i in both])
    return shown


def _by_dataset(places: list[list[Any]]) -> dict[str, list[int]]:
    """Of places [uri, number] the numbers by dataset."""
    found: dict[str, list[int]] = {}
    for uri, i in places:
        found.setdefault(uri, []).append(i)
    return found


def _shown(places: list[list[Any]]) -> list[dict[str, str]]:
    """Pictures of the images at these places [uri, number], in their order."""
    found = {}
    for uri, ids in _by_dataset(places).items():
        dataset = Dataset.open(uri)
        columns = Reader(dataset, ["image", f"predicted_{OWN}", "confidence"]).gather(np.array(ids, np.int64))
        names = dataset.header.values_of(f"predicted_{OWN}")
        answers = zip(ids, columns["image"], columns[f"predicted_{OWN}"], columns["confidence"], strict=True)
        for i, image, answer, sure in answers:
            found[uri, i] = {"uri": picture_uri(image), "says": f"{names[answer]} {sure:.2f}"}
    return [found[uri, i] for uri, i in places]


def _percent(rate: dict[str, Any]) -> str:
    if rate["rate"] is None:  # of pairs, where rules withheld the first drawing of all
        return "–"
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})"


def _ratio(of: dict[str, float | None]) -> str:
    value, low, high = (of[name] for name in ("value", "low", "high"))
    ends = f"{low or 0:.2f}–{'∞' if high is None else f'{high:.2f}'}"
    return f"{'∞' if value is None else f'{value:.2f}'} ({ends})"
