"""What the report says of privacy and use, from folders as runs leave them; the whole report is looked at in
`tests/jobs/test_chain.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rayproj.data.dataset import Dataset
from rayproj.evaluation.fairness import Judged, fairness
from rayproj.evaluation.quality import memorisation, quality
from rayproj.evaluation.skewsize import skewsize
from rayproj.report.build import build
from rayproj.storage.store import Store, to_json
from tests.support import images

TRAINING = {"steps": 3, "parameters": 10, "ranks": 1, "zero_stage": 2, "device": "cpu", "seconds": 1.0}
PRIVACY = {"delta": 1e-5, "num_samples": 50, "sample_rate": 0.1, "steps": 3, "releases": 3, "clip_norm": 1.0,
           "noise_multiplier": 1.0, "multiplicity": 1, "accountant": "PLD", "unsafe_metrics": False,
           "secure_noise": False}  # fmt: skip
MODELS = {"pre": ("public", "", None), "eight": ("private", "pre", 8.0), "one": ("private", "pre", 1.0),
          "free": ("private", "pre", None), "alone": ("private", "", 1.0), "later": ("public", "free", None)}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six models by (data, start, ε), a synthetic set of each, and their evaluation."""
    found = Store(str(tmp_path))

    def run(name: str, job: str, config: dict[str, Any], result: dict[str, Any]) -> None:
        found.at(name).put_once("config.yaml", yaml.safe_dump(config).encode())
        found.at(name).put_once("result.json", to_json({"job": job, "finished_at": 1.0, "seconds": 1.0, **result}))

    for name, (data, start, epsilon) in MODELS.items():
        init = str(tmp_path / start) if start else ""
        config: dict[str, Any] = {"diffusion": {"latents": data, "init": init}}
        certificate = {"epsilon": epsilon, "delta": 1e-5} if epsilon else None
        if epsilon:
            config |= {"privacy": {}}
            run(name, "finetune_private", config, {**TRAINING, "privacy": {**PRIVACY, "epsilon": epsilon}})
        else:
            run(name, "train_diffusion", config, TRAINING)
        header = images.header(16, 16)
        header.provenance.update(model=str(tmp_path / name), private=certificate)
        images.commit(Dataset.create(str(tmp_path / "synthetic" / name), header), 0)
    accuracy = {
        name: {"value": 0.1 * i, "low": 0.1 * i - 0.01, "high": 0.1 * i + 0.01, "n": 9} for i, name in enumerate(MODELS)
    }
    distance = {"real": 1.0, **{name: 100.0 + i for i, name in enumerate(MODELS)}}
    rng = np.random.default_rng(0)
    measures = {name: quality(*rng.normal(size=(2, 30, 4))) for name in distance}
    measures["one"] |= memorisation(*rng.normal(size=(3, 30, 4)))
    run("evaluate", "evaluate", {"evaluate": {"synthetic": {n: str(tmp_path / "synthetic" / n) for n in MODELS}}}, {
        "classes": list("abc"), "accuracy": accuracy, "confusion": {n: [[1, 0], [0, 1]] for n in MODELS},
        "quality": {"feature_extractor": "x", "samples": 9, "frechet_distance": distance, "measures": measures},
        "skewsize": None, "watermark": {"images": 9, "chance": 1e-3, "sets": {
            "real": {"as they are": {"found": 0.002, "z": 1.0, "chance": 1e-9, "scores": [0.1, -1.0]}},
            "one": {"as they are": {"found": 0.987, "z": 1.0, "chance": 1e-9, "scores": [4.0, 0.0], "area": 0.75}},
        }},
    })  # fmt: skip
    return tmp_path


def test_what_is_said_of_groups(root: Path) -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 4, 800), rng.choice(["d", "l"], 800)
    logits = rng.normal(size=(800, 4)) + 2 * np.eye(4)[np.where(groups == "d", (labels + 1) % 4, labels)]
    judged = Judged(labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), (1,))
    done = json.loads((root / "evaluate" / "result.json").read_text())
    done["skewsize"] = {"one": {"tone": skewsize(labels, judged.predictions, groups, tuple("abcd"), permutations=20)}}
    done["fairness"] = {"one": {"tone": fairness(judged, groups, bootstraps=5), "few": fairness(judged, groups, 999)}}
    (root / "evaluate" / "result.json").write_text(json.dumps(done))
    report, html = build(str(root), {})
    assert report["skewsize"] == done["skewsize"] and report["fairness"] == done["fairness"]
    worst = done["fairness"]["one"]["tone"]["measures"]["high-risk sensitivity"]
    assert f"{worst['worst_group']}: {worst['worst']:.3f}" in html and "fewer than two groups of 999" in html
    odds = done["fairness"]["one"]["tone"]
    said = f"{odds['equalized_odds']:.3f} ({'–'.join(f'{v:.3f}' for v in odds['equalized_odds_interval'])})"
    assert "<td>equalised odds</td>" in html and said in html
    assert f"{done['skewsize']['one']['tone']['value']:.2f}" in html and "times, not" in html


def test_each_set_is_beside_what_was_promised_for_it(root: Path) -> None:
    report, html = build(str(root), {})
    rows = {row["name"]: row for row in report["privacy_and_use"]}
    assert {name: row["epsilon"] for name, row in rows.items()} == {
        "pre": 0.0, "one": 1.0, "eight": 8.0, "free": None, "alone": 1.0, "later": None,
    }, "what began with a model that saw private images without a promise has none either"  # fmt: skip
    assert [row["name"] for row in report["privacy_and_use"]] == ["pre", "one", "eight", "free", "later", "alone"]
    assert [name for name, row in rows.items() if row["from_scratch"]] == ["pre", "alone"]
    assert rows["one"]["accuracy"]["value"] == pytest.approx(0.2) and rows["one"]["frechet_distance"] == 102.0
    assert set(report["private_models"]) == {"one", "eight", "alone"}
    assert "0.2 % (1e-09)" in html and "98.7 % (1e-09)" in html and "false positives" in html
    assert html.count("copying score") == 2 and "its limit for ever more images" in html
    assert "The limit is not told" not in html
    done = json.loads((root / "evaluate" / "result.json").read_text())
    done["quality"]["measures"]["one"] |= quality(*np.random.default_rng(0).normal(size=(2, 7, 4)))
    (root / "evaluate" / "result.json").write_text(json.dumps(done))
    assert "The limit is not told (–) where a set has fewer than twice as many images" in build(str(root), {})[1]
    assert 'alt="Accuracy and Fréchet distance over ε"' in html and "The promises hold for each model by itself" in html


def test_no_private_image_is_shown(root: Path) -> None:
    """Of the folders of a chain, the report opens the test images and the synthetic ones alone."""
    images.write(str(root / "data" / "private"))
    before = list((root / "data" / "private").rglob("*.tar"))
    assert before
    for path in before:
        path.write_bytes(b"no tar")  # whoever reads it fails
    build(str(root), {})
