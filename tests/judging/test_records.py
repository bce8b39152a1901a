"""What was recorded of images: counted as it is by hand, and whatever was changed is found.

What the policy and the safety rules record is tested where they do it: tests/jobs/test_generate.py, tests/synthesis/
test_conditions.py and tests/jobs/test_serve_playground.py.
"""

from pathlib import Path

import numpy as np
import pytest

from rayproj.data.dataset import Dataset, Header
from rayproj.data.encodings import ENCODINGS
from rayproj.errors import UserError
from rayproj.judging.records import ServedConfig, decided, filtered, served, verified
from rayproj.responsibility.provenance import SIDECAR, ProvenanceConfig, Signer, write_keys
from rayproj.storage.store import Store, sha256_hex, to_json
from tests.support import images


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_keys(str(tmp_path_factory.mktemp("keys")))


@pytest.fixture(scope="module")
def signer(keys: list[Path]) -> Signer:
    return Signer(ProvenanceConfig(str(keys[0]), str(keys[1])))


def test_sets_that_verify_are_counted_by_their_images(tmp_path: Path, signer: Signer, keys: list[Path]) -> None:
    sets = {
        name: images.write(f"{tmp_path}/{name}", count)
        for name, count in {"sound": 40, "changed": 24, "none": 8}.items()
    }
    for name in ("sound", "changed"):
        signer.sign_dataset(sets[name])
    shard = next((tmp_path / "changed" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes() + b"x")
    uris = {name: dataset.uri for name, dataset in sets.items()}
    found = verified(uris, trust=str(keys[2]))
    assert found["images"] == {"sound": 40, "of": 72} and found["files"] == {}
    assert {name: (of["form"], of["sound"], of["trusted"]) for name, of in found["sets"].items()} == {
        "sound": ("signed sidecar", True, True),
        "changed": ("signed sidecar", False, True),
        "none": ("none", False, None),
    }
    assert "was changed" in found["sets"]["changed"]["problems"][0]
    (tmp_path / "others").mkdir()
    strangers = write_keys(str(tmp_path / "others" / "keys"))
    assert verified(uris, trust=str(strangers[2]))["images"]["sound"] == 0, "signed by somebody else"
    assert verified(uris)["images"]["sound"] == 40, "whoever signed"


def test_single_images_are_counted_by_their_form(tmp_path: Path, signer: Signer) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "signed" / "below"
    folder.mkdir(parents=True)
    for number in range(5):
        data = ENCODINGS["png"].encode(rng.integers(0, 256, (3, 8, 8), dtype=np.uint8))
        (folder / f"{number}.png").write_bytes(data if number else data + b"x")
        (folder / f"{number}.png{SIDECAR}").write_bytes(signer.sidecar(sha256_hex(data), {"seed": number}))
    found = verified({}, str(tmp_path / "signed"))
    assert found["files"] == {"signed sidecar": {"sound": 4, "of": 5}} and found["images"] == {"sound": 0, "of": 0}
    assert len(found["wrong"]) == 1 and found["wrong"][0].startswith("0.png: the contents were changed")
    with pytest.raises(UserError, match=r"There is no image in judge.signed=.*; give a folder of png"):
        verified({}, str(tmp_path / "none"))


def test_images_with_a_manifest_are_told_from_those_without(tmp_path: Path, signer: Signer) -> None:
    pytest.importorskip("c2pa")
    plain = ENCODINGS["png"].encode(np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8))
    (tmp_path / "a.png").write_bytes(signer.embedded(plain, "png", {"seed": 1}))
    (tmp_path / "b.png").write_bytes(plain)
    found = verified({}, str(tmp_path))
    assert found["files"] == {"C2PA manifest": {"sound": 1, "of": 1}, "none": {"sound": 0, "of": 1}}
    assert found["wrong"] == ["b.png: the file has no C2PA manifest, and there is no sidecar"]


def test_a_dataset_of_before_has_counts_without_reasons(tmp_path: Path) -> None:
    counts = {"allow": 5, "block sexual": 2, "rewrite a, b": 1}
    header = Header("x", {}, 1, 1, (), provenance={"policy": {"decisions": counts}})
    found = decided(Dataset.create(str(tmp_path / "a"), header).uri)
    assert found is not None and (found["allow"], found["block"], found["rewrite"]) == (5, 2, 1)
    assert found["rules"] == [
        {"action": "block", "rule": "sexual", "reason": "", "prompts": 2},
        {"action": "rewrite", "rule": "a, b", "reason": "", "prompts": 1},
    ]
    plain = images.write(str(tmp_path / "plain"), 8).uri
    assert decided(plain) is None and filtered(plain) is None


def test_decisions_of_a_playground_are_counted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"There is no run at judge.playground.run"):
        served(ServedConfig(store.uri))
    store.write("run.json", to_json({"job": "serve_playground"}))
    assert served(ServedConfig(store.uri)) == {"decisions": [], "loads": []} and served(ServedConfig()) is None
    said = [("withhold", "loud", "no"), ("block", "sexual", "it is"), ("block", "sexual", "it is")]
    for number, (action, rule, reason) in enumerate(said):
        record = {"action": action, "rule": rule, "reason": reason, "before": f"prompt {number}", "at": 1.0}
        store.write(f"decisions/{number}.json", to_json(record))
    found = served(ServedConfig(store.uri))
    assert found is not None and [tuple(d.values()) for d in found["decisions"]] == [(*said[1], 2), (*said[0], 1)]
    assert "prompt" not in str(found), "who reads the report need not read what was asked"
