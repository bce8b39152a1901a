"""The built wheel, outside the checkout, runs the whole demo in small; and everything it leaves behind is looked at."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rayproj import classifiers
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from tests.support.commands import ROOT, environment, run

SMALL = [
    "import_data.data.fractions={public: 0.1, private: 0.1, rest: 0.8}",
    "train_autoencoder.train.steps=12",
    "train_autoencoder.train.batch=16",
    "train_autoencoder.train.preview_every=6",
    "train_diffusion.train.steps=12",
    "train_diffusion.train.batch=32",
    "train_diffusion.train.preview_every=6",
    "finetune_private.train.steps=3",
    "finetune_private.privacy.expected_batch=8",
    *(f"generate_{kind}.generate.samples=200" for kind in ("public", "private")),
    *(f"generate_{kind}.generate.shard_size=64" for kind in ("public", "private")),
    *(f"generate_{kind}.generate.sampler.steps=2" for kind in ("public", "private")),
    *(f"classifier_{kind}.train.steps=8" for kind in ("real", "public", "private")),
    *(f"classifier_{kind}.train.batch=50" for kind in ("real", "public", "private")),
    "evaluate.evaluate.samples=150",
    # Diffusion and its fine-tuning on two ranks, the rest on one, because processes take long to start.
    *(f"{stage}.cluster.ranks=1" for stage in ("train_autoencoder", "classifier_real", "classifier_public")),
    *(f"{stage}.cluster.ranks=1" for stage in ("classifier_private", "evaluate")),
    *(f"{stage}.pool.actors=1" for stage in ("encode_latents", "generate_private")),
]
STAGES = {
    "import_data", "train_autoencoder", "encode_latents", "train_diffusion", "finetune_private", "generate_public",
    "generate_private", "classifier_real", "classifier_public", "classifier_private", "evaluate",
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, its dependencies apart."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=200)
    wheel = next(folder.glob("rayproj-*.whl"))
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=200
    )
    return folder / "site"


def demo(installed: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import rayproj, sys; from rayproj.cli import main; print(rayproj.__file__); sys.exit(main())"
    return run(sys.executable, "-c", code, "demo", *SMALL, cwd=cwd, timeout=560, PYTHONPATH=str(installed))


@pytest.fixture(scope="module")
def chain(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished small demo."""
    cwd = tmp_path_factory.mktemp("user")
    done = demo(installed, cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed)), "the checkout was imported instead of the wheel"
    assert "The report: " in done.stderr
    return cwd / "runs" / "demo"


@pytest.mark.timeout(580)
def test_the_report_has_every_number_that_is_promised(chain: Path) -> None:
    report = json.loads((chain / "report.json").read_text())
    promised = {
        "diffusion": {"steps", "loss_first", "loss_last", "images_per_second"},
        "privacy": {"epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "clip_norm"},
        "synthesis": {"samples", "shards", "images_per_second"},
        "classifier": {"accuracy_real", "accuracy_synthetic", "accuracy_private"},
        "quality": {"frechet_distance", "feature_extractor"},
        "environment": {"python", "packages"},
    }
    for section, names in promised.items():
        assert names <= report[section].keys(), section
        assert all(report[section][name] is not None for name in names)
    assert set(report["stages"]) == STAGES and all(s["seconds"] > 0 for s in report["stages"].values())
    assert (report["diffusion"]["steps"], report["synthesis"]["samples"], report["synthesis"]["shards"]) == (12, 200, 4)
    assert 0 < report["privacy"]["epsilon"] <= 8 and report["privacy"]["releases"] == 3


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            assert values.get("alt")
            self.pictures.append(values["src"] or "")
        self.links += [v for k, v in attributes if k in ("href", "src", "srcset") and v and not v.startswith("data:")]


def test_the_page_stands_alone_and_its_pictures_are_pictures(chain: Path) -> None:
    text = (chain / "report.html").read_text()
    page = Page(text)
    assert page.links == [] and "url(" not in text
    assert len(page.pictures) == 6
    for source in page.pictures:
        kind, data = re.fullmatch(r"data:image/(.+);base64,(.+)", source).groups()  # type: ignore[union-attr]
        content = base64.b64decode(data)
        if kind == "png":
            picture = np.array(Image.open(io.BytesIO(content)).convert("L"))
            assert picture.shape[0] > 200 and picture.std() > 10
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg") and len(content) > 3000
    report = json.loads((chain / "report.json").read_text())
    for value in (report["classifier"]["accuracy_real"], report["classifier"]["accuracy_private"]):
        assert f"{100 * value:.1f} %" in text
    assert f"ε = {report['privacy']['epsilon']:.2f}" in text


def test_accuracies_are_those_of_the_saved_classifiers(chain: Path) -> None:
    import torch

    report = json.loads((chain / "report.json").read_text())
    test = Dataset.open(str(chain / "data" / "test"))
    found = Reader(test, ["image", "label"]).gather(np.arange(test.header.num_samples))
    for name, key in (("real", "accuracy_real"), ("public", "accuracy_synthetic"), ("private", "accuracy_private")):
        # The run's config has paths relative to the folder that the demo ran in.
        text = (chain / f"classifier_{name}" / "config.yaml").read_text()
        absolute = text.replace("data: runs/demo", f"data: {chain}")
        (chain / f"classifier_{name}" / "config.yaml").write_text(absolute)
        model = classifiers.load(str(chain / f"classifier_{name}"), "cpu")
        (chain / f"classifier_{name}" / "config.yaml").write_text(text)
        with torch.no_grad():
            predictions = model(torch.from_numpy(found["image"])).argmax(1).numpy()
        assert (predictions == found["label"]).mean() == pytest.approx(report["classifier"][key], abs=1e-9)


def test_private_data_never_reaches_public_training(chain: Path) -> None:
    """The parts of the split share no image, and each training's config names its own."""
    parts = {}
    for part in ("public", "private", "test"):
        dataset = Dataset.open(str(chain / "data" / part))
        images = Reader(dataset, ["image"]).gather(np.arange(dataset.header.num_samples))["image"]
        parts[part] = {image.tobytes() for image in images}
    assert (
        sum(len(p) for p in parts.values()) >= 3980
    )  # of 991, 1,001 and 2,000; Fashion-MNIST has a few exact duplicates
    for stage in ("train_autoencoder", "train_diffusion", "classifier_public", "classifier_real"):
        assert "private" not in (chain / stage / "config.yaml").read_text()


def test_synthetic_shards_are_balanced_complete_and_certified(chain: Path) -> None:
    for kind in ("public", "private"):
        dataset = Dataset.open(str(chain / "synthetic" / kind))
        assert dataset.complete
        labels = Reader(dataset, ["label"]).gather(np.arange(200))["label"]
        assert np.array_equal(np.bincount(labels), [20] * 10)
        certificate = dataset.header.provenance["private"]
        assert (certificate is None) == (kind == "public")
        if certificate:
            assert 0 < certificate["epsilon"] <= 8 and certificate["relation"] == "ADD_OR_REMOVE_ONE"
    secret = (chain / "finetune_private" / "secret" / "key").read_bytes()
    for path in chain.rglob("*"):
        if path.is_file() and path.parent.name != "secret":
            content = path.read_bytes()
            assert secret not in content and secret.hex().encode() not in content, path


def test_a_shard_made_again_is_byte_identical(chain: Path, installed: Path) -> None:
    """Another process, another order, alone: the tar of shard 2 has the same hash."""
    code = (
        "import json, sys; from rayproj.synthesis.synthesizer import Synthesizer\n"
        "from rayproj.data.dataset import Dataset; from rayproj.data.writer import build_tar\n"
        "from rayproj.storage.store import sha256_hex; import torch; torch.set_num_threads(1)\n"
        "uri = 'runs/demo/synthetic/public'; header = Dataset.open(uri).header\n"
        "samples = Synthesizer({'out': uri, 'batch': 128}, 'cpu').make(2)\n"
        "print(sha256_hex(build_tar(samples, {n: f.encoding for n, f in header.fields.items()})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=chain.parents[1], env=environment(PYTHONPATH=str(installed)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = Dataset.open(str(chain / "synthetic" / "public")).record(2)
    assert record is not None and found.stdout.strip() == record.sha256


def test_metrics_and_timeline_were_kept(chain: Path) -> None:
    for stage in ("train_autoencoder", "train_diffusion", "finetune_private", "classifier_public"):
        rows = [json.loads(line) for line in (chain / stage / "metrics.jsonl").read_text().splitlines()]
        assert all(row["images_per_second"] > 0 for row in rows)
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        spans = [json.loads(line) for line in (chain / stage / "timeline.jsonl").read_text().splitlines()]
        assert {s["actor"] for s in spans} >= {"rank 0"} and all(s["end"] >= s["start"] for s in spans)
    assert list((chain / "train_diffusion" / "images").glob("preview-*.png"))
    spent = [json.loads(line)["epsilon"] for line in (chain / "finetune_private" / "metrics.jsonl").open()]
    assert spent == sorted(spent)


def test_a_second_demo_reports_what_is_there(chain: Path, installed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}
    again = demo(installed, chain.parents[1])
    assert again.returncode == 0 and "The report: " in again.stderr
    changed = {p for p in chain.rglob("*") if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    assert changed == set()


def test_status_lists_the_runs(chain: Path) -> None:
    found = run(sys.executable, "-m", "rayproj.cli", "status", str(chain))
    assert found.returncode == 0
    lines = {line.split()[0]: line.split()[1:] for line in found.stdout.splitlines()[1:]}
    assert lines.keys() >= STAGES and all(lines[stage][0] == "done" for stage in STAGES)
    assert lines["train_diffusion"][1:3] == ["12", "12"]
