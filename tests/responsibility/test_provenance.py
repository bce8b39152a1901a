"""Signed images and datasets: what is signed is read back, and every change after it is found."""

import hashlib
import io
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from PIL import Image

from rayproj import cli
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.encodings import ENCODINGS
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.judging import records
from rayproj.responsibility import provenance
from rayproj.responsibility.provenance import SIDECAR, ProvenanceConfig, Signer, check
from rayproj.storage.store import sha256_hex

FACTS = {"model_commit": "c0ffee", "seed": 3, "guidance": 1.5, "privacy": {"epsilon": 8.0, "delta": 1e-5}}
needs_c2pa = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("c2pa"), reason="c2pa-python is not installed"
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    assert cli.main(["provenance", "keys", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def signer(keys: Path) -> Signer:
    return Signer(ProvenanceConfig(str(keys / "key.pem"), str(keys / "certificate.pem")))


def picture(kind: str) -> bytes:
    return ENCODINGS[kind].encode(np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8))


def one_pixel_changed(data: bytes, kind: str) -> bytes:
    """The same file with a pixel of the picture changed, its manifest untouched."""
    changed = bytearray(data)
    if kind == "png":  # a bit of the last image chunk, before its checksum and the end
        changed[data.rindex(b"IEND") - 20] ^= 1
    elif kind == "jpg":
        changed[-50] ^= 1
    else:
        changed[data.index(b"VP8L") + 200] ^= 1
    return bytes(changed)


@needs_c2pa
def test_what_is_no_image_has_no_bad_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes(picture("png")[:100])
    assert cli.main(["provenance", "check", str(tmp_path / "t.txt")]) == 2
    assert "t.txt: no provenance (it is no image of a kind that can have" in capsys.readouterr().out
    assert "it cannot be read" in check(str(tmp_path / "cut.png")).problems[0], "of an image that is damaged it is"


@needs_c2pa
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_manifest_is_read_back_and_a_changed_pixel_is_found(
    keys: Path, signer: Signer, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, file, trust = picture(kind), tmp_path / f"image.{kind}", str(keys / "authority.pem")
    signed = signer.embedded(plain, kind, FACTS)
    before, after = (np.asarray(Image.open(io.BytesIO(data))) for data in (plain, signed))
    assert np.array_equal(before, after), "the picture is as it was"
    file.write_bytes(signed)
    found = check(str(file), trust)
    assert found.sound and found.trusted and found.facts == FACTS and "rayproj test signer" in found.signer
    alone = check(str(file))
    assert alone.sound and alone.trusted is None, "the signature is valid, whoever it is"
    assert cli.main(["provenance", "check", str(file), "--trust", trust]) == 0
    assert "sound C2PA manifest" in capsys.readouterr().out
    file.write_bytes(one_pixel_changed(signed, kind))
    found = check(str(file), trust)
    assert not found.sound and found.problems == ("the picture was changed after it was signed",)
    assert cli.main(["provenance", "check", str(file)]) == 2
    assert "wrong: the picture was changed" in capsys.readouterr().out
    lied = signed.replace(b"c0ffee", b"c0ffef")
    assert lied != signed
    file.write_bytes(lied)
    assert check(str(file), trust).problems == ("what the manifest states was changed after it was signed",)


@needs_c2pa
def test_the_manifest_says_what_c2pa_asks_for(signer: Signer) -> None:
    import c2pa

    with c2pa.Reader("image/png", io.BytesIO(signer.embedded(picture("png"), "png", FACTS))) as reader:
        manifest: Any = reader.get_active_manifest()
    assert manifest["claim_generator_info"][0]["name"] == "rayproj" and manifest["claim_version"] == 2
    actions = next(a["data"]["actions"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions"))
    kind = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert [(a["action"], a["digitalSourceType"]) for a in actions] == [("c2pa.created", kind)]


@needs_c2pa
def test_a_signer_whom_nobody_vouches_for_is_not_trusted(keys: Path, signer: Signer, tmp_path: Path) -> None:
    provenance.write_keys(str(tmp_path / "others"))
    other, file = tmp_path / "others" / "authority.pem", tmp_path / "image.png"
    file.write_bytes(signer.embedded(picture("png"), "png", FACTS))
    assert check(str(file), str(other)).trusted is False and not check(str(file), str(other)).sound
    file.write_bytes(picture("png"))
    (tmp_path / f"image.png{SIDECAR}").write_bytes(signer.sidecar(sha256_hex(picture("png")), FACTS))
    assert check(str(file), str(other)).trusted is False and check(str(file), str(keys / "authority.pem")).trusted


@pytest.mark.parametrize("bare", [False, True])
def test_a_sidecar(keys: Path, tmp_path: Path, bare: bool) -> None:
    """By a key with a certificate, and by an Ed25519 key alone."""
    config, trust = ProvenanceConfig(str(keys / "key.pem"), str(keys / "certificate.pem")), keys / "authority.pem"
    if bare:
        key = ed25519.Ed25519PrivateKey.generate()
        pem, own = serialization.Encoding.PEM, serialization.NoEncryption()
        (tmp_path / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, own))
        trust = tmp_path / "public"
        trust.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        config = ProvenanceConfig(str(tmp_path / "key"))
    signer, file, data = Signer(config), tmp_path / "image.png", picture("png")
    assert not bare or not signer.embeds, "C2PA needs a certificate"
    beside = tmp_path / f"image.png{SIDECAR}"
    file.write_bytes(data)
    beside.write_bytes(signer.sidecar(sha256_hex(data), FACTS))
    found = check(str(file), str(trust))
    assert found.sound and found.trusted and found.facts == FACTS, found
    file.write_bytes(one_pixel_changed(data, "png"))
    assert "the contents were changed" in check(str(file)).problems[0]
    file.write_bytes(data)
    said = json.loads(beside.read_bytes())
    said["facts"]["privacy"]["epsilon"] = 0.1
    beside.write_text(json.dumps(said))
    assert check(str(file)).problems == ("the sidecar was changed after it was signed",)
    beside.write_text("{")
    assert "cannot be read" in check(str(file)).problems[0]
    # One who signs anew with a key of their own is seen by those who know whom they trust.
    provenance.write_keys(str(tmp_path / "forger"))
    forger = Signer(ProvenanceConfig(str(tmp_path / "forger/key.pem"), str(tmp_path / "forger/certificate.pem")))
    beside.write_bytes(forger.sidecar(sha256_hex(data), {"privacy": {"epsilon": 0.1}}))
    assert check(str(file)).sound and check(str(file), str(trust)).trusted is False


def test_a_dataset(signer: Signer, keys: Path, tmp_path: Path) -> None:
    said = {"model_commit": "c0ffee", "seed": 0, "private": None}
    header = Header("numbers", {"x": Field("int")}, 4, 2, (), provenance=said)
    dataset = Dataset.create(str(tmp_path / "set"), header)
    for shard in (0, 1):
        commit_shard(dataset, shard, [{"key": str(i), "x": i} for i in header.shard_range(shard)], "test", 0.0)
    assert check(dataset.uri).form == "none"
    signer.sign_dataset(dataset)
    found = check(dataset.uri, str(keys / "authority.pem"))
    assert found.sound and found.trusted and found.facts == {**said, "name": "numbers", "samples": 4}
    for name in ("weights.npy", "withheld/000000.json", "withheld/000001.json"):
        dataset.store.write(name, b"as it was")
    assert check(dataset.uri).problems[0] == "weights.npy is none of what was signed" and not check(dataset.uri).sound
    signer.sign_dataset(dataset)
    assert check(dataset.uri).sound
    dataset.store.write("weights.npy", b"changed")
    dataset.store.delete_tree("withheld/000001.json")
    assert check(dataset.uri).problems == ("weights.npy was changed", "withheld/000001.json is missing")
    dataset.store.write("weights.npy", b"as it was")
    dataset.store.write("withheld/000001.json", b"as it was")
    tar = Path(dataset.uri, dataset.records()[1].object)
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert check(dataset.uri).problems == (f"the shard {dataset.records()[1].object} was changed",)
    tar.unlink()
    assert "is missing" in check(dataset.uri).problems[0]
    Path(dataset.uri, "dataset.json").write_bytes(header.to_json().replace(b"numbers", b"letters"))
    assert "the contents were changed" in check(dataset.uri).problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        *({"sha256": value} for value in (5, None, [], {})),
        *({"facts": value} for value in (5, None, "x", [1])),
        *({"files": value} for value in (5, None, "xy")),
        *({"public_key": value} for value in (5, None, "", "\ud800", "-----BEGIN PUBLIC KEY-----")),
        *({"signature": value} for value in (5, None, "x", "é")),
        *({"certificate": value} for value in (5, "x", ["x"])),
    ],
)
def test_whatever_a_sidecar_holds_it_is_told_as_not_sound(
    signer: Signer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    data, file = picture("png"), tmp_path / "image.png"
    file.write_bytes(data)
    said = {**json.loads(signer.sidecar(sha256_hex(data), FACTS)), **changes}
    (tmp_path / f"image.png{SIDECAR}").write_text(json.dumps(said))
    found = check(str(file))
    assert not found.sound and found.problems and str(found)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_a_sidecar_that_is_nested_deeply_ends_nothing(signer: Signer, tmp_path: Path, depth: int) -> None:
    data, file = picture("png"), tmp_path / "image.png"
    file.write_bytes(data)
    said = json.dumps({**json.loads(signer.sidecar(sha256_hex(data), FACTS)), "facts": {"x": 0}})
    (tmp_path / f"image.png{SIDECAR}").write_text(said.replace('"x": 0', '"x": ' + "[" * depth + "]" * depth))
    assert not check(str(file)).sound
    told = records.verified({}, str(tmp_path))
    assert told["files"] == {"signed sidecar": {"sound": 0, "of": 1}} and told["wrong"][0].startswith("image.png: ")


def test_no_name_of_a_property_replaces_what_is_stated() -> None:
    plan = {"model_commit": "c0ffee", "private": {"epsilon": 8.0, "delta": 1e-5, "ledger": "1ed9e5", "more": 1}}
    names = (
        "seed",
        "steps",
        "guidance",
        "prompt",
        "model_commit",
        "privacy",
        "watermark",
        "prompt_sha256",
        "provenance",
    )
    conditions = dict.fromkeys(names, "a lie")
    found = provenance.facts_of(plan, "a cat", 3, 1.5, 20, conditions)
    assert found == {
        "model_commit": "c0ffee",
        "prompt_sha256": hashlib.sha256(b"a cat").hexdigest(),
        "seed": 3,
        "guidance": 1.5,
        "steps": 20,
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "ledger": "1ed9e5"},
        "watermark": "",
        "conditions": conditions,
    }


def test_of_several_keys_and_certificates_whichever_vouches(keys: Path, signer: Signer, tmp_path: Path) -> None:
    pem, own = serialization.Encoding.PEM, serialization.NoEncryption()
    private = [ed25519.Ed25519PrivateKey.generate() for _ in range(3)]
    public = [key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo) for key in private]
    authority, trust = (keys / "authority.pem").read_bytes(), tmp_path / "trust.pem"
    data, file = picture("png"), tmp_path / "image.png"
    file.write_bytes(data)
    signers = [signer]
    for number, key in enumerate(private):
        (tmp_path / f"{number}").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, own))
        signers.append(Signer(ProvenanceConfig(str(tmp_path / f"{number}"))))
    for trusted, vouched in (
        ([public[0], public[1]], [False, True, True, False]),
        ([public[2], b"a comment\n", authority], [True, False, False, True]),
        ([authority, public[1]], [True, False, True, False]),
    ):
        trust.write_bytes(b"".join(trusted))
        for one, expected in zip(signers, vouched, strict=True):
            (tmp_path / f"image.png{SIDECAR}").write_bytes(one.sidecar(sha256_hex(data), FACTS))
            assert check(str(file), str(trust)).trusted is expected
    trust.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="has no certificate or public key"):
        check(str(file), str(trust))


@needs_c2pa
def test_a_strangers_sidecar_does_not_stand_in_for_a_manifest(keys: Path, signer: Signer, tmp_path: Path) -> None:
    provenance.write_keys(str(tmp_path / "stranger"))
    stranger = Signer(ProvenanceConfig(*(str(tmp_path / "stranger" / f) for f in ("key.pem", "certificate.pem"))))
    for kind in ("png", "jpg", "webp"):
        file, signed = tmp_path / f"image.{kind}", one_pixel_changed(signer.embedded(picture(kind), kind, FACTS), kind)
        file.write_bytes(signed)
        (tmp_path / f"image.{kind}{SIDECAR}").write_bytes(
            stranger.sidecar(sha256_hex(signed), {"model_commit": "mine"})
        )
        found = check(str(file))
        assert found.form == "C2PA manifest" and found.problems == ("the picture was changed after it was signed",)
        plain = picture(kind)
        file.write_bytes(plain)
        (tmp_path / f"image.{kind}{SIDECAR}").write_bytes(signer.sidecar(sha256_hex(plain), FACTS))
        assert check(str(file), str(keys / "authority.pem")).form == "signed sidecar"
    public = tmp_path / "public.pem"
    key = stranger.key.public_key()
    public.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    odd: Any = ["no names"]
    file.write_bytes(stranger.embedded(picture("webp"), "webp", odd))
    assert check(str(file)).facts == {} and "sound" in str(check(str(file)))
    file.write_bytes(signer.embedded(picture("webp"), "webp", FACTS))
    assert check(str(file), str(public)).trusted is False, "a key vouches for no certificate of another"


def test_keys(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stat.S_IMODE((keys / "key.pem").stat().st_mode) == 0o600
    assert cli.main(["provenance", "keys", str(keys)]) == 2 and "is there already" in capsys.readouterr().err
    provenance.write_keys(str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not that of the key"):
        Signer(ProvenanceConfig(str(keys / "key.pem"), str(tmp_path / "other" / "certificate.pem")))
    (tmp_path / "no.pem").write_text("x")
    for file in ("no.pem", "none.pem"):
        with pytest.raises(UserError, match="cannot be read"):
            Signer(ProvenanceConfig(str(tmp_path / file)))
    assert cli.main(["provenance", "check", str(tmp_path / "none.png")]) == 2
