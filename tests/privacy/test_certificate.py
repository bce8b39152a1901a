"""What a synthetic dataset says of the private data behind it, whether the training has finished or not."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.engine.checkpoint import Commit
from rayproj.errors import UserError
from rayproj.privacy import accounting
from rayproj.privacy.certificate import certificate
from rayproj.privacy.ledger import Ledger, epsilon_spent, next_start, secret_key, spent
from rayproj.privacy.plan import PrivacyConfig, PrivacyPlan, plan
from rayproj.storage.store import FileRecord, Store, to_json
from rayproj.synthesis.plan import GenerateConfig
from rayproj.synthesis.plan import plan as synthesis_plan

PRIVACY = {"noise_multiplier": 1.5, "delta": 1e-3, "expected_batch": 20}
STEPS = 6


def commit(store: Store, step: int) -> None:
    files = (FileRecord("x", 1, f"{step}"),)
    record = Commit(step, "a", 1, 2, files, metrics={}, committed_at=0.0)
    store.put_once(f"checkpoints/step-{step:08d}/COMMIT.json", to_json(asdict(record)))


def model(folder: Path, name: str, init: str = "", private: bool = True) -> Store:
    """A run as jobs/finetune_private.py or train_diffusion.py has it after its first commit."""
    store = Store(str(folder / name))
    values: dict[str, Any] = {
        "diffusion": {"latents": str(folder / "latents"), "init": init},
        "train": {"steps": STEPS},
    }
    store.put_once("config.yaml", yaml.safe_dump(values | ({"privacy": PRIVACY} if private else {})).encode())
    commit(store, 4)
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    autoencoder = Store(str(tmp_path / "autoencoder"))
    autoencoder.put_once("result.json", to_json({"image_shape": [1, 8, 8], "latent_shape": [4, 4, 4]}))
    commit(autoencoder, 1)
    fields, made = {"label": Field("int"), "moments": Field("npy", (8, 4, 4))}, {"autoencoder": autoencoder.uri}
    header = Header("faces latents", fields, 200, 100, ("a", "b"), provenance=made)
    Dataset.create(str(tmp_path / "latents"), header)
    return tmp_path


def mechanism() -> PrivacyPlan:
    return plan(PrivacyConfig(**PRIVACY), 200, STEPS)  # type: ignore[arg-type]


def charge(run: Store, *steps: int) -> None:
    ledger = Ledger(run, mechanism(), secret_key(run), next_start(run))
    for step in steps:
        ledger.charge(step)


def certified(run: Store, folder: Path) -> Any:
    header = synthesis_plan(GenerateConfig(model=run.uri, out=str(folder / "out"), samples=10), 0)
    return json.loads(header.to_json())["provenance"]


def test_an_unfinished_private_model_is_certified_by_its_ledger(folder: Path) -> None:
    run = model(folder, "private")
    charge(run, 0, 1, 2, 3)
    charge(run, 3)
    provenance = certified(run, folder)
    found = provenance["private"]
    expected = accounting.epsilon_of([(0.1, 1.5, 3), (0.1, 1.5 / 2**0.5, 1)], 1e-3)
    assert found["epsilon"] == pytest.approx(expected) and found["delta"] == 1e-3
    assert (found["relation"], found["digest"], found["releases"]) == ("ADD_OR_REMOVE_ONE", mechanism().digest(), 5)
    assert (found["sample_rate"], found["noise_multiplier"], found["num_samples"]) == (0.1, 1.5, 200)
    assert found["model_commit"] == provenance["model_commit"] and found["unsafe_metrics"] is False
    records = [json.loads(path.read_text()) for path in sorted((folder / "private" / "ledger").iterdir())]
    text = json.dumps(records, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert found["ledger"] == hashlib.sha256(text.encode()).hexdigest()


def test_another_release_is_another_certificate_and_another_dataset(folder: Path) -> None:
    run = model(folder, "private")
    charge(run, 0, 1, 2, 3)
    before = certified(run, folder)
    assert certified(run, folder) == before
    charge(run, 4)
    after = certified(run, folder)
    assert after["private"]["ledger"] != before["private"]["ledger"] and after["plan"] != before["plan"]
    assert after["private"]["epsilon"] > before["private"]["epsilon"]


def test_a_finished_run_is_certified_by_its_plan_and_its_ledger(folder: Path) -> None:
    run = model(folder, "private")
    charge(run, *range(STEPS))
    recorded = {**mechanism().describe(), "epsilon": 1.0, "releases": STEPS, "unsafe_metrics": True}
    run.put_once("result.json", to_json({"privacy": recorded}))
    (folder / "latents" / "dataset.json").rename(folder / "gone.json")
    found = certificate(run)
    assert found is not None and found["unsafe_metrics"] is True
    assert found["epsilon"] == epsilon_spent(spent(run), 1e-3) == pytest.approx(mechanism().epsilon())


def test_what_is_made_of_a_private_model_has_its_certificate(folder: Path) -> None:
    public = model(folder, "public", private=False)
    assert certificate(public) is None and certified(public, folder)["private"] is None
    first = model(folder, "first", init=public.uri)
    charge(first, 0)
    tuned = model(folder, "tuned", init=first.uri, private=False)
    found, own = certificate(tuned), certificate(first)
    assert own is not None and found == {**own, "through": tuned.uri}
    assert certified(tuned, folder)["private"]["epsilon"] == own["epsilon"]
    second = model(folder, "second", init=tuned.uri)
    charge(second, 0, 1)
    both = certificate(second)
    assert both is not None and both["releases"] == 2 and both["initialised_from"] == found
    with pytest.raises(UserError, match="There is no run"):
        certificate(Store(str(folder / "nothing")))
