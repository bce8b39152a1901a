"""The report of a chain of runs, from what they left behind: nothing is computed anew."""

from __future__ import annotations

import os
import platform
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.report import figures, obfuscations, robustness, soups
from rayproj.report.pages import data_uri, rendered
from rayproj.storage.store import Store, from_json
from rayproj.tracking.tracker import rows_of

PACKAGES = (
    "torch",
    "triton",
    "ray",
    "deepspeed",
    "diffusers",
    "webdataset",
    "wandb",
    "omegaconf",
    "dp-accounting",
    "numpy",
)
TRAINED = ("train_autoencoder", "train_diffusion", "finetune_private")  # the jobs whose trainings are shown
MODELS = {
    "train_autoencoder": "autoencoder",
    "train_diffusion": "diffusion, public",
    "finetune_private": "diffusion, private",
}
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

        if "accuracy" in self.results.get("evaluate", {}):
            found = self.results["evaluate"]
            named = [(found, "accuracy"), (found, "confusion")]
            for holder, key in [*named, (found["quality"], "frechet_distance"), (found["quality"], "measures")]:
                holder[key] = _ordered(holder[key])

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        return rows_of(self.stores[name], file) if name in self.stores else []

    def config(self, name: str) -> str:
        return self.stores[name].read("config.yaml").decode()

    def of(self, job: str) -> list[str]:
        """The finished stages that are of a job, in the order in which they ended."""
        found = [name for name, result in self.results.items() if result["job"] == job]
        return sorted(found, key=lambda name: self.results[name]["finished_at"])


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
    trained = [name for job in TRAINED for name in stages.of(job)]
    report["trainings"] = {MODELS.get(name, name): training(stages, name) for name in trained}
    private = stages.of("finetune_private")
    if private:
        report["private_models"] = {n: {**done[n]["privacy"], "training": training(stages, n)} for n in private}
        first = "finetune_private" if "finetune_private" in private else private[0]
        report["privacy"] = report["private_models"][first]
    for name, key in (("generate_private", "synthesis_private"), ("generate_public", "synthesis")):
        if name in done:
            report[key] = {k: done[name][k] for k in ("samples", "shards", "images_per_second", "manifest")}
    if under_attack := {k: v for name in stages.of("evaluate") for k, v in done[name].get("robustness", {}).items()}:
        report["robustness"] = under_attack
    if mixed := stages.of("soup"):
        report["soups"] = {name: done[name] for name in mixed}
    if "accuracy" in done.get("evaluate", {}):
        found = done["evaluate"]
        named = {"real": "accuracy_real", "public": "accuracy_synthetic", "private": "accuracy_private"}
        report["classifier"] = {named.get(n, f"accuracy_{n}"): v["value"] for n, v in found["accuracy"].items()}
        report["classifier"]["intervals"] = found["accuracy"]
        if found["quality"]["measures"]:
            report["quality"] = {
                **found["quality"],
                "frechet_distance": found["quality"]["frechet_distance"].get("public"),
                "frechet_distances": found["quality"]["frechet_distance"],
            }
        if found.get("tests"):
            report["tests"] = {name: test["accuracy"] for name, test in found["tests"].items()}
        if found.get("skewsize"):
            report["skewsize"] = found["skewsize"]
        if found.get("fairness"):
            report["fairness"] = found["fairness"]
        if found.get("watermark"):
            report["watermark"] = found["watermark"]
        if private:
            report["privacy_and_use"] = privacy_and_use(stages)
    if measured := stages.of("evaluate_obfuscations"):
        report["obfuscations"] = {
            name: {**obfuscations.tables(done[name]), "metrics": done[name]["metrics"]} for name in measured
        }
    ordered = sorted(done.items(), key=lambda item: item[1]["finished_at"])
    report["stages"] = {name: {"job": r["job"], "seconds": r["seconds"]} for name, r in ordered}
    report["environment"] = environment()
    return report


def privacy_and_use(stages: Stages) -> list[dict[str, Any]]:
    """What each synthetic set is worth and what its private data were promised, the strongest promise first.

    A set is that of `evaluate.synthetic`, and its classifier the one of the same name. Its ε is 0 where nothing private was
    seen, and None, that is ∞, where private data were trained on without a promise.
    """
    result = stages.results["evaluate"]
    given: Any = OmegaConf.to_container(OmegaConf.create(stages.config("evaluate")))
    protected = {_values(stages.stores[name])["diffusion"]["latents"] for name in stages.of("finetune_private")}
    rows = []
    for name, uri in given["evaluate"]["synthetic"].items():
        made = Dataset.open(uri).header.provenance
        values, certificate = _values(Store(made["model"])), made["private"]
        accuracy = result["accuracy"].get(name)
        rows.append(
            {
                "name": name,
                "epsilon": certificate["epsilon"] if certificate else None if _saw(values, protected) else 0.0,
                "delta": certificate["delta"] if certificate else None,
                "from_scratch": not values["diffusion"].get("init"),
                "accuracy": accuracy,
                "frechet_distance": result["quality"]["frechet_distance"][name],
            }
        )
    return sorted(rows, key=lambda row: (row["from_scratch"] and row["epsilon"] != 0, _size(row["epsilon"])))


def _values(run: Store) -> Any:
    return OmegaConf.to_container(OmegaConf.create(run.read("config.yaml").decode()))


def _saw(values: Any, protected: set[str]) -> bool:
    """Whether a model, or one that it started from, was trained on protected data."""
    init = values["diffusion"].get("init")
    return values["diffusion"]["latents"] in protected or bool(init and _saw(_values(Store(init)), protected))


def _size(epsilon: float | None) -> float:
    return float("inf") if epsilon is None else epsilon


def environment() -> dict[str, Any]:
    """The machine and the versions that made the report."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str:
    """ "" of a package that is not there: the engine and the kernels are measured where Ray is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def sample_columns(stages: Stages, per_class: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Images by source, uint8 [classes, per_class, C, H, W], and the class names."""
    root = stages.root
    sources = {"real": "data/test"}  # whoever reads a report may see no private image
    made = [path.split("/")[1] for path in root.list("synthetic") if path.endswith("/dataset.json")]
    sources |= {name: f"synthetic/{name}" for name in _ordered(dict.fromkeys(sorted(made)))}
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
        columns[TITLES.get(name, name)] = np.stack(rows)
    return columns, classes


def pictures(stages: Stages, report: dict[str, Any]) -> dict[str, str]:
    """The report's figures as data URIs, by name."""
    found: dict[str, str] = {}
    columns, classes = sample_columns(stages, 6 if len(stages.of("generate")) < 4 else 3)
    if columns:
        found["samples"] = data_uri(figures.png(figures.samples(columns, classes)), "png")
    series = {}
    for name in [name for job in TRAINED for name in stages.of(job)]:
        rows = [row for row in stages.lines(name, "metrics.jsonl") if "loss" in row]
        if rows:
            series[MODELS.get(name, name)] = ([row["step"] for row in rows], [row["loss"] for row in rows])
    if series:
        found["losses"] = data_uri(figures.svg(figures.curves(series, "loss")), "svg+xml")
    spent = {}
    for name in stages.of("finetune_private"):
        rows = [row for row in stages.lines(name, "metrics.jsonl") if "epsilon" in row]
        if rows:
            title = MODELS.get(name, name)
            spent[title] = ([row["step"] for row in rows], [row["epsilon"] for row in rows])
    if spent:
        found["epsilon"] = data_uri(figures.svg(figures.curves(spent, "ε spent")), "svg+xml")
    rows = report.get("privacy_and_use", [])
    if len([row for row in rows if row["epsilon"] and row["accuracy"]]) > 1:
        real = report["classifier"]["intervals"].get("real")
        found["privacy_and_use"] = data_uri(figures.svg(figures.privacy_and_use(rows, real)), "svg+xml")
    if "robustness" in report:
        found["robust_accuracy"] = data_uri(figures.svg(robustness.robust_accuracy(report["robustness"])), "svg+xml")
        if any("cost" in one for one in report["robustness"].values()):
            cost = robustness.robustness_and_cost(report["robustness"])
            found["robustness_and_cost"] = data_uri(figures.svg(cost), "svg+xml")
        if tried := {
            n: one for n, one in report["robustness"].items() if "queries" in next(iter(one["threats"].values()))
        }:
            found["defences_attacked"] = data_uri(figures.svg(robustness.defences_attacked(tried)), "svg+xml")
        if attacked := attacked_images(stages, 8):
            found["perturbed"] = data_uri(figures.png(robustness.perturbed(attacked)), "png")
    if soups.shared(report.get("soups", {})):
        found["soups_compared"] = data_uri(figures.svg(soups.compared(report["soups"])), "svg+xml")
    for name, mixed in report.get("soups", {}).items():
        found[f"soups of {name}"] = data_uri(figures.svg(soups.lines(mixed)), "svg+xml")
        found[f"trade-offs of {name}"] = data_uri(figures.svg(soups.trade_offs(mixed)), "svg+xml")
    marked = report.get("watermark", {}).get("sets", {})
    if any("area" in one for of in marked.values() for one in of.values()):
        found["watermark"] = data_uri(figures.svg(figures.watermark(marked)), "svg+xml")
    if "accuracy" in stages.results.get("evaluate", {}):
        result = stages.results["evaluate"]
        chance = 1 / len(result["classes"])
        found["accuracy"] = data_uri(figures.svg(figures.accuracy_bars(result["accuracy"], chance, TITLES)), "svg+xml")
        matrices = figures.confusions(result["confusion"], result["classes"], TITLES)
        found["confusion"] = data_uri(figures.svg(matrices), "svg+xml")
    for name in stages.of("evaluate_obfuscations"):
        found[f"heat map of {name}"] = data_uri(obfuscations.heat_map(stages.results[name]), "svg+xml")
        if spokes := obfuscations.radar(stages.results[name]):
            found[f"radar of {name}"] = data_uri(spokes, "svg+xml")
    for name in filter(partial(_may_be_shown, stages), stages.of("obfuscate")):
        found[f"gallery of {name}"] = data_uri(figures.png(_gallery(stages, name)), "png")
    spans = [{"stage": name, **span} for name in stages.stores for span in stages.lines(name, "timeline.jsonl")]
    if spans:
        found["timeline"] = data_uri(figures.svg(figures.timeline(spans)), "svg+xml")
    return found


def attacked_images(stages: Stages, count: int) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """The first images that were broken, by classifier and threat, for `robustness.perturbed`."""
    found = {}
    for stage in stages.of("evaluate"):
        given = _values(stages.stores[stage])["robustness"]
        for name, one in stages.results[stage].get("robustness", {}).items():
            dataset, test = Dataset.open(f"{given['out']}/{name}"), Dataset.open(given["test"])
            for threat in one["threats"] if "cost" not in one else []:
                by = Reader(dataset, [f"{threat}_by"]).gather(np.arange(dataset.header.num_samples))[f"{threat}_by"]
                first = np.flatnonzero((by != "") & (by != "clean"))[:count]
                if len(first):
                    attacked = Reader(dataset, [f"{threat}_image", "label"]).gather(first)
                    clean = Reader(test, ["image"]).gather(first)["image"].astype(np.float32) / 255
                    names = [dataset.header.classes[label] for label in attacked["label"]]
                    found[f"{name}, {threat}"] = (clean, attacked[f"{threat}_image"], names)
    return found


def _may_be_shown(stages: Stages, name: str) -> bool:
    """Whether an obfuscated dataset is of test or of synthetic images: whoever reads a report may see no private image."""
    origin = Dataset.open(stages.results[name]["dataset"]).header.provenance["obfuscated_from"]
    return origin == stages.root.at("data/test").uri or origin.startswith(stages.root.at("synthetic").uri)


def _gallery(stages: Stages, name: str) -> Figure:
    """The first images of an obfuscated dataset, a row for each obfuscation."""
    dataset = Dataset.open(stages.results[name]["dataset"])
    names = dataset.header.fields["obfuscation"].values
    per_name = dataset.header.num_samples // len(names)
    reader, count = Reader(dataset, ["image"]), min(10, per_name)
    rows = [reader.gather(k * per_name + np.arange(count))["image"] for k in range(len(names))]
    return figures.samples({"": np.stack(rows)}, list(names), zoom=0.5)


def build(root: str, places: dict[str, str]) -> tuple[dict[str, Any], str]:
    """report.json as a dict, and report.html as text that needs no other file.

    Args:
        root: where the runs and datasets lie.
        places: stage name -> run dir; {} takes every finished run right below `root`.
    """
    stages = Stages(Store(root), places)
    report = gather(stages)
    imported = stages.results.get("import_data", {})
    configs = {name: stages.config(name) for name in report["stages"]}
    shown = pictures(stages, report)
    mixed = {name: soups.rows(one) for name, one in report.get("soups", {}).items()}
    html = rendered(
        "template.html", soups=mixed, report=report, pictures=shown, imported=imported, configs=configs, titles=TITLES
    )
    return report, html


def _ordered(by_name: dict[str, Any]) -> dict[str, Any]:
    """Real before public before private before the rest, whatever order the JSON has."""
    return {
        name: by_name[name] for name in [*(n for n in TITLES if n in by_name), *sorted(by_name.keys() - TITLES.keys())]
    }
