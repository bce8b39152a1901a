"""Cards of runs and datasets say what the records say, and of what no record holds that it is not recorded."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from rayproj import cli
from rayproj.curation.curate import CurateConfig, curate
from rayproj.curation.scorers import RuleConfig, Scorer
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.engine.checkpoint import commits
from rayproj.export.records import data_card, model_card
from rayproj.storage.store import Store, to_json
from rayproj.synthesis.plan import commit_hash, plan
from rayproj.synthesis.synthesizer import Synthesizer
from tests.support.ranks import run_ranks
from tests.support.shapes import config_of, train_both, write_images

FRECHET = {
    "real": {"frechet_distance": 181.75, "recall": 0.909},
    "drawn": {"frechet_distance": 1045.25, "recall": None},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained models, a dataset of one, and an evaluation of it as jobs/evaluate.py leaves it."""
    path = tmp_path_factory.mktemp("cards")
    run_ranks(train_both, 1, str(path))
    config = config_of(path, out=str(path / "synthetic"))
    dataset = Dataset.create(config.out, plan(config, 0))
    maker = Synthesizer({"out": config.out, "batch": 3}, "cpu")
    for shard in range(3):
        commit_shard(dataset, shard, maker.make(shard), "test", 0.1)
    run = Store(str(path / "denoiser"))
    run.write(
        "run.json", to_json({"job": "train_diffusion", "version": "9.8.7", "revision": "abc123", "created_at": 0.0})
    )
    given = {"test": f"{path}/images", "reference": f"{path}/images", "synthetic": {"drawn": dataset.uri}}
    evaluation = Store(str(path / "evaluation"))
    evaluation.write("config.yaml", yaml.safe_dump({"evaluate": given}).encode())
    measured = {"samples": 12, "feature_extractor": "lite0", "measures": FRECHET}
    marked = {"sets": {"drawn": {"JPEG 90": {"found": 0.75, "z": 9.0, "chance": 1e-9, "area": 0.9375}}}}
    evaluation.write("result.json", to_json({"quality": measured, "watermark": marked, "tests": {}}))
    return path


def sections(text: str) -> dict[str, str]:
    found = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(found[1::2], found[2::2], strict=True)}


def test_a_model_card_has_the_sections_and_numbers_of_the_records(folder: Path) -> None:
    run = Store(str(folder / "denoiser"))
    text = model_card(run, [str(folder / "evaluation")])
    card, found = ModelCard(text), sections(text)
    assert card.data.library_name == "pytorch" and "image-generation" in card.data.tags
    assert list(found)[:9] == [
        *("Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data"),
        *("Quantitative analyses", "Ethical considerations", "Caveats and recommendations"),
    ], "as Mitchell et al. 2019 have them"
    details = found["Model details"]
    assert commit_hash(commits(run)[-1]) in details and "step 2 of 2" in details
    assert "rayproj 9.8.7, revision abc123" in details and "1970-01-01" in details
    assert "| parameters | not recorded |" in details and "| licence of the model | not recorded |" in details
    assert found["Intended use"].startswith("Not recorded")
    numbers = found["Quantitative analyses"]
    assert "| frechet distance | 181.8 | 1045 |" in numbers and "| recall | 0.909 | not recorded |" in numbers
    assert "| drawn | JPEG 90 | 0.75 | 0.9375 |" in numbers
    assert "1045" in found["Caveats and recommendations"] and "shapes latents, 12 samples" in found["Training data"]
    assert "may have learned single examples of it by heart" in found["Ethical considerations"]
    assert str(folder) not in text, "the places on this machine concern nobody"


def test_without_an_evaluation_nothing_is_said_of_quality(folder: Path) -> None:
    found = sections(model_card(Store(str(folder / "denoiser"))))
    assert found["Quantitative analyses"] == found["Metrics"] == found["Factors"] == "Not recorded."
    assert "No evaluation was given" in found["Caveats and recommendations"]


def test_a_data_card_of_a_synthetic_set(folder: Path) -> None:
    dataset = Dataset.open(str(folder / "synthetic"))
    text = data_card(dataset)
    card, found = DatasetCard(text), sections(text)
    assert card.data.pretty_name == "synthetic shapes" and card.data.size_categories == ["n<1K"]
    assert dataset.manifest_hash() in found["Composition"] and "| samples | 10 |" in found["Composition"]
    cells = dict(re.findall(r"^\| (\w+ × a \w+ \w+) \| (\d+) \|$", found["Composition"], flags=re.MULTILINE))
    assert cells == {"bold × a red square": "3", "flat × a red square": "3", "bold × a blue disc": "2",
                     "flat × a blue disc": "2"}  # fmt: skip
    assert dataset.header.provenance["model_commit"] in found["Collection process"]
    assert "by the policy" in found["Preprocessing and filters"] and "allow: 2" in found["Preprocessing and filters"]
    assert "saw no private data" in found["Privacy"] and "made by a model" in found["Uses"]


def test_a_data_card_counts_what_filters_left_out(tmp_path: Path) -> None:
    images = write_images(str(tmp_path / "images"))
    rules = {
        "wordless": RuleConfig(Scorer.words, at_least=1.0),
        "blue": RuleConfig(Scorer.blocked, at_most=0.0, words=["blue"]),
    }
    curate(CurateConfig(images.uri, str(tmp_path / "curated"), rules), lambda event: None)
    found = sections(data_card(Dataset.open(str(tmp_path / "curated"))))
    said = found["Preprocessing and filters"]
    assert "6 samples were left out" in said
    assert "wordless: words at_least 1: 3" in said and "blue: blocked at_most 0: 3" in said
    assert "| x | 6 |" in found["Composition"] and "licence: not recorded" in found["Distribution"]
    assert "these are the images themselves" in found["Privacy"]


def classifier_run(folder: Path) -> Store:
    """A classifier's run as the job leaves it, as far as a card reads it."""
    header = Header("pets", {"image": Field("png", (3, 8, 8)), "label": Field("int")}, 2, 2, ("cat", "dog"))
    dataset = Dataset.create(str(folder / "pets"), header)
    images = [{"key": str(i), "image": np.zeros((3, 8, 8), np.uint8), "label": i} for i in (0, 1)]
    commit_shard(dataset, 0, images, "test", 0.1)
    run = Store(str(folder / "classifier"))
    config = {"data": dataset.uri, "classifier": {"network": "convolutional"}, "train": {"steps": 5}}
    run.write("config.yaml", yaml.safe_dump(config).encode())
    commit = {
        "step": 5,
        "attempt": "a",
        "world_size": 1,
        "zero_stage": 0,
        "files": [],
        "metrics": {},
        "committed_at": 1.0,
    }
    run.write("checkpoints/step-00000005/COMMIT.json", to_json(commit))
    return run


def test_a_classifier_card_names_its_weak_spots_by_the_numbers(tmp_path: Path) -> None:
    run = classifier_run(tmp_path)
    accuracy: dict[str, Any] = {"value": 0.8, "low": 0.75, "high": 0.85, "n": 200}
    elsewhere = {"value": 0.6, "low": 0.55, "high": 0.65, "n": 150}
    gap = {"overall": 0.8, "by_group": {"dark": 0.7, "light": 0.9}, "worst_group": "dark", "worst": 0.7, "gap": 0.2}
    tables = {
        "tone": {"measures": {"accuracy": {**gap, "interval": [0.1, 0.3]}, "recall": {**gap, "interval": [-0.1, 0.3]}}}
    }
    result = {
        "classes": ["cat", "dog"], "accuracy": {"ours": accuracy, "other": elsewhere},
        "confusion": {"ours": [[90, 10], [30, 70]], "other": [[1, 0], [0, 1]]}, "fairness": {"ours": tables},
        "tests": {"shelter": {"accuracy": {"ours": elsewhere}, "fairness": None}},
    }  # fmt: skip
    given = {"test": f"{tmp_path}/pets", "classifiers": {"ours": run.uri, "other": "/elsewhere"}, "groups": ["tone"]}
    evaluation = Store(str(tmp_path / "evaluation"))
    evaluation.write("config.yaml", yaml.safe_dump({"evaluate": given}).encode())
    evaluation.write("result.json", to_json(result))
    found = sections(model_card(run, [evaluation.uri]))
    numbers = found["Quantitative analyses"]
    assert "| test | ours | 0.8 | 0.75 to 0.85 | 200 |" in numbers and "| shelter | ours | 0.6 |" in numbers
    assert "| test | tone | accuracy | 0.8 | dark: 0.7 | 0.2 |" in numbers and "other" not in numbers
    weak = found["Caveats and recommendations"]
    assert "Of dog it gets 70.0 % right" in weak and "On shelter its accuracy is lower: 60.0 % against 80.0 %" in weak
    assert "accuracy differs by tone: worst for dark (0.7), gap 0.2" in weak and "recall differs" not in weak
    assert found["Factors"] == "- tone: measured by group, below"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = str(folder / "denoiser"), str(tmp_path / "card.md")
    assert cli.main(["card", run, "--to", file, "--evaluation", str(folder / "evaluation")]) == 0
    assert Path(file).read_text() == model_card(Store(run), [str(folder / "evaluation")])
    for words, says in (
        ([run, "--to", file], "is there already"),
        ([str(tmp_path), "--to", f"{file}x"], "neither a run nor a dataset"),
        (
            [str(folder / "weak"), "--to", f"{file}x", "--evaluation", str(folder / "evaluation")],
            "did not judge the model",
        ),
        ([run, "--to", f"{file}x", "--evaluation", str(tmp_path)], "is no finished run"),
    ):
        assert cli.main(["card", *words]) == 2 and says in capsys.readouterr().err
    assert json.loads(json.dumps(ModelCard(Path(file).read_text()).data.to_dict()))
