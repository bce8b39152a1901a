"""The report of a chain of runs, from what they left behind: nothing is computed anew."""

from __future__ import annotations

import base64
import json
import os
import platform
from importlib import metadata
from importlib.resources import files
from typing import Any

import numpy as np

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.report import figures
from rayproj.storage.store import Store, from_json

PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "webdataset", "wandb", "omegaconf", "dp-accounting", "numpy")
TITLES = {"real": "real images", "public": "public model's images", "private": "private model's images"}


class Stages:
    """The finished runs below a folder, by name."""

    def __init__(self, root: Store, places: dict[str, str]) -> None:
        self.root = root
        if not places:
            results = [path.split("/") for path in root.list() if path.endswith("/result.json")]
            places = {parts[0]: root.at(parts[0]).uri for parts in results if len(parts) == 2}
        self.stores = {name: Store(uri) for name, uri in places.items()}
        self.results = {n: from_json(s.read("result.json")) for n, s in self.stores.items() if s.exists("result.json")}

        if "evaluate" in self.results:
            found = self.results["evaluate"]
            for holder, key in ((found, "accuracy"), (found, "confusion"), (found["quality"], "frechet_distance")):
                holder[key] = _ordered(holder[key])

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        store = self.stores.get(name)
        if store is None or not store.exists(file):
            return []
        return [json.loads(line) for line in store.read(file).splitlines()]

    def config(self, name: str) -> str:
        return self.stores[name].read("config.yaml").decode()


def training(stages: Stages, name: str) -> dict[str, Any]:
    """What a training run came to: its result with the first and last logged loss and the median speed."""
    rows = stages.lines(name, "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    result = stages.results[name]
    return {
        **{key: result[key] for key in ("steps", "parameters", "ranks", "zero_stage", "device", "seconds")},
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "images_per_second": float(np.median(speeds)) if speeds else None,
    }


def gather(stages: Stages) -> dict[str, Any]:
    """report.json: every number of the report, under stable names; what was not run is left out."""
    done = stages.results
    report: dict[str, Any] = {}
    for name, key in (("train_autoencoder", "autoencoder"), ("train_diffusion", "diffusion")):
        if name in done:
            report[key] = training(stages, name)
    if "train_autoencoder" in done:
        report["autoencoder"]["psnr"] = done["train_autoencoder"]["psnr"]
    if "finetune_private" in done:
        report["privacy"] = {**done["finetune_private"]["privacy"], "training": training(stages, "finetune_private")}
    for name, key in (("generate_private", "synthesis_private"), ("generate_public", "synthesis")):
        if name in done:
            report[key] = {k: done[name][k] for k in ("samples", "shards", "images_per_second", "manifest")}
    if "evaluate" in done:
        found = done["evaluate"]
        named = {"real": "accuracy_real", "public": "accuracy_synthetic", "private": "accuracy_private"}
        report["classifier"] = {named.get(n, f"accuracy_{n}"): v["value"] for n, v in found["accuracy"].items()}
        report["classifier"]["intervals"] = found["accuracy"]
        report["quality"] = {
            **found["quality"],
            "frechet_distance": found["quality"]["frechet_distance"].get("public"),
            "frechet_distances": found["quality"]["frechet_distance"],
        }
        if found.get("skewsize"):
            report["skewsize"] = found["skewsize"]
    ordered = sorted(done.items(), key=lambda item: item[1]["finished_at"])
    report["stages"] = {name: {"job": r["job"], "seconds": r["seconds"]} for name, r in ordered}
    report["environment"] = environment()
    return report


def environment() -> dict[str, Any]:
    """The machine and the versions that made the report."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def sample_columns(stages: Stages, per_class: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Images by source, uint8 [classes, per_class, C, H, W], and the class names."""
    root = stages.root
    sources = {"real": "data/public", "public": "synthetic/public", "private": "synthetic/private"}
    columns: dict[str, np.ndarray] = {}
    classes: list[str] = []
    for name, place in sources.items():
        if not root.exists(f"{place}/dataset.json"):
            continue
        dataset = Dataset.open(root.at(place).uri)
        if not dataset.complete:
            continue
        classes = list(dataset.header.classes)
        found = Reader(dataset, fields=["image", "label"]).gather(np.arange(min(1024, dataset.header.num_samples)))
        rows = []
        for label in range(len(classes)):
            images = found["image"][found["label"] == label][:per_class]
            missing = per_class - len(images)
            rows.append(np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)]))
        columns[TITLES[name]] = np.stack(rows)
    return columns, classes


def pictures(stages: Stages, report: dict[str, Any]) -> dict[str, str]:
    """The report's figures as data URIs, by name."""
    found: dict[str, str] = {}
    columns, classes = sample_columns(stages, 6)
    if columns:
        found["samples"] = _uri(figures.png(figures.samples(columns, classes)), "png")
    series = {}
    for name, title in (
        ("train_autoencoder", "autoencoder"),
        ("train_diffusion", "diffusion, public"),
        ("finetune_private", "diffusion, private"),
    ):
        rows = [row for row in stages.lines(name, "metrics.jsonl") if "loss" in row]
        if rows:
            series[title] = ([row["step"] for row in rows], [row["loss"] for row in rows])
    if series:
        found["losses"] = _uri(figures.svg(figures.curves(series, "loss")), "svg+xml")
    spent = [row for row in stages.lines("finetune_private", "metrics.jsonl") if "epsilon" in row]
    if spent:
        curve = {"privacy spent": ([row["step"] for row in spent], [row["epsilon"] for row in spent])}
        found["epsilon"] = _uri(figures.svg(figures.curves(curve, "ε")), "svg+xml")
    if "evaluate" in stages.results:
        result = stages.results["evaluate"]
        chance = 1 / len(result["classes"])
        found["accuracy"] = _uri(figures.svg(figures.accuracy_bars(result["accuracy"], chance, TITLES)), "svg+xml")
        matrices = figures.confusions(result["confusion"], result["classes"], TITLES)
        found["confusion"] = _uri(figures.svg(matrices), "svg+xml")
    spans = [{"stage": name, **span} for name in stages.stores for span in stages.lines(name, "timeline.jsonl")]
    if spans:
        found["timeline"] = _uri(figures.svg(figures.timeline(spans)), "svg+xml")
    return found


def build(root: str, places: dict[str, str]) -> tuple[dict[str, Any], str]:
    """report.json as a dict, and report.html as text that needs no other file.

    Args:
        root: where the runs and datasets lie.
        places: stage name -> run dir; {} takes every finished run right below `root`.
    """
    from jinja2 import Environment

    stages = Stages(Store(root), places)
    report = gather(stages)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("rayproj.report").joinpath("template.html").read_text()
    )
    imported = stages.results.get("import_data", {})
    configs = {name: stages.config(name) for name in report["stages"]}
    html = template.render(
        report=report, pictures=pictures(stages, report), imported=imported, configs=configs, titles=TITLES
    )
    return report, html


def readme_picture(root: str) -> bytes:
    """One PNG that shows a chain's outcome: real beside synthetic images."""
    columns, classes = sample_columns(Stages(Store(root), {}), 8)
    return figures.png(figures.samples(columns, classes, zoom=0.42))


def _ordered(by_name: dict[str, Any]) -> dict[str, Any]:
    """Real before public before private before the rest, whatever order the JSON has."""
    return {
        name: by_name[name] for name in [*(n for n in TITLES if n in by_name), *sorted(by_name.keys() - TITLES.keys())]
    }


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
