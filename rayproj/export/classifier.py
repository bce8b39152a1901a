"""Classifiers as weights, a description and a program that needs torch alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.classifiers.epinet import Epinet
from rayproj.classifiers.model import EPINET, KEPT, digest
from rayproj.classifiers.networks import ClassifierConfig
from rayproj.data.dataset import Dataset
from rayproj.engine.checkpoint import commits, load_ema
from rayproj.engine.engine import load_flat
from rayproj.export.card import Card, describe, guarantee, last_part, no_guarantee
from rayproj.storage.store import Store, to_json
from rayproj.synthesis.plan import commit_hash


def _base_of(model: Epinet, text: bytes) -> dict[str, str]:
    """What tells the base of an epinet: the digest of its weights, and the run and commit that it is from, if it is as it
    was there."""
    base, run = digest(model.base.state_dict()), configuration.value(text, "start")["run"]
    said = {"base": base, "base_run": last_part(run) if run else "", "base_commit": ""}
    if run and commits(Store(run)):
        weights, commit = load_ema(Store(run))
        flat = {name: tensor.flatten() for name, tensor in model.base.state_dict().items()}
        if weights.keys() >= flat.keys() and all(torch.equal(weights[n], t) for n, t in flat.items()):
            said["base_commit"] = commit_hash(commit)
    return said


def write_classifier(run: Store, folder: Path) -> Card:
    text = run.read("config.yaml")
    header = Dataset.open(configuration.value(text, "data")).header
    weights, commit = load_ema(run)
    model = classifiers.load(run.uri, "cpu")
    # Of the commit that the card names, if another came in between.
    load_flat(model, {name: tensor for name, tensor in weights.items() if name not in KEPT})
    shape = header.fields["image"].shape
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    if isinstance(model, Epinet):
        said = {"epistemic": json.dumps(model.options(), sort_keys=True), **_base_of(model, text)}
        save_file(model.apart(), folder / EPINET, metadata={"format": "pt", **said})
    architecture = configuration.to_dict(configuration.section(ClassifierConfig, text, "classifier"))
    config = {
        "architecture": {"name": type(model).__name__, **architecture},
        "input": {
            "shape": list(shape),
            "dtype": "uint8",
            "range": [0, 255],
            "normalisation": "x / 127.5 - 1; model.pt2 does it, whoever rebuilds the model from its weights has to",
        },
        "classes": list(header.classes),
    }
    (folder / "config.json").write_bytes(to_json(config))
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has the paths of this machine
    torch.export.save(program, folder / "model.pt2")
    code = f"""
import json

import json

import torch

classes = json.load(open("config.json", encoding="utf-8"))["classes"]
model = torch.export.load("model.pt2").module()
images = torch.randint(0, 256, ({", ".join(map(str, (4, *shape)))}), dtype=torch.uint8)
logits = model(images)
names = [classes[i] for i in logits.argmax(1)]
"""
    made = header.provenance.get("model")
    privacy = [no_guarantee(header.name)]
    if made:
        origin = f"the model `{last_part(made)}` that drew its images"
        certificate = header.provenance["private"]
        privacy = [guarantee(certificate, f"the private data of {origin}")] if certificate else []
        privacy += [no_guarantee(f"all {'other ' if certificate else ''}data of {origin}")]
    return Card(
        about=f"A classifier of uint8 images of {'x'.join(map(str, shape))} (channels, height, width). "
        f"The classes: {', '.join(header.classes)}.",
        library="pytorch",
        tags=["image-classification", "rayproj"],
        code=code,
        commit=commit,
        data=[describe(header, "Classifier")],
        privacy=privacy,
    )
