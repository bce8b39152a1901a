"""Where an image or a dataset is from, signed: C2PA's manifest inside of an image (C2PA Technical Specification 2), or JSON
beside it.

A manifest tells others what made the image and that nobody changed it since; who signs is told by a certificate. C2PA wants
one for signatures alone (keyUsage digitalSignature, an extended usage such as emailProtection or documentSigning), issued by
an authority: a signature under any other is valid but not trusted, and viewers say so. A signature is lost where somebody
takes the picture out of its file, as most platforms do; the watermark is for that.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rayproj import __version__
from rayproj.data.dataset import Dataset
from rayproj.errors import UserError
from rayproj.storage.store import Store, sha256_hex, to_json

# https://cv.iptc.org/newscodes/digitalsourcetype: what the digital source type of an image by such a model is.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ASSERTION = "rayproj.generation"  # label of our own assertion
SIDECAR = ".provenance.json"  # what is put behind the name of a file
OF_DATASET = "provenance.json"
PEM = rb"(?s)-----BEGIN %b-----.*?-----END %b-----"
KINDS = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}
Key = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey


@dataclass
class ProvenanceConfig:
    """Who signs. `rayproj provenance keys DIR` makes a pair to try it with."""

    key: str = ""  # PEM file of a private key, Ed25519 or on the curve P-256; "": nothing is signed
    # PEM file of its certificate and those that vouch for it, the key's first. Without, images get no C2PA manifest.
    certificate: str = ""

    def problems(self) -> list[str]:
        return ["provenance.certificate goes with provenance.key."] if self.certificate and not self.key else []


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        form: "C2PA manifest", "signed sidecar" or "none".
        signer: whom the certificate names; of a bare key its fingerprint.
        trusted: whether the given anchors vouch for the signer; None if none were given.
        problems: a sentence each on what is wrong. A signer who is merely not vouched for is none.
        facts: what the signer states.
    """

    file: str
    form: str
    signer: str = ""
    trusted: bool | None = None
    problems: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return self.form != "none" and not self.problems and self.trusted is not False

    def __str__(self) -> str:
        if self.form == "none":
            return f"{self.file}: no provenance ({'; '.join(self.problems)})"
        who = {None: "not asked whether that is to be trusted; give --trust", True: "trusted", False: "NOT TRUSTED"}[
            self.trusted
        ]
        lines = [f"{self.file}: {'BAD' if self.problems else 'sound'} {self.form}, signed by {self.signer} ({who})"]
        lines += [f"  wrong: {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"  {name}: {value}" for name, value in self.facts.items())])


class Signer:
    """Signs for images and datasets.

    Raises:
        UserError: a file cannot be read, or the certificate is not the key's.
    """

    def __init__(self, config: ProvenanceConfig) -> None:
        try:
            key = serialization.load_pem_private_key(Path(config.key).read_bytes(), password=None)
            self.chain = Path(config.certificate).read_bytes() if config.certificate else b""
            certificates = x509.load_pem_x509_certificates(self.chain) if self.chain else []
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"provenance.key='{config.key}' or its certificate cannot be read ({error}); both are PEM files, the key "
                "without a password."
            ) from error
        curve = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
        if not curve and not isinstance(key, ed25519.Ed25519PrivateKey):
            raise UserError(f"provenance.key='{config.key}' is neither an Ed25519 key nor one on the curve P-256.")
        self.key: Key = key  # type: ignore[assignment]
        self.algorithm = "es256" if curve else "ed25519"
        if certificates and certificates[0].public_key() != key.public_key():
            raise UserError(f"The first certificate of '{config.certificate}' is not that of the key '{config.key}'.")

    @property
    def embeds(self) -> bool:
        """Whether images get a C2PA manifest: there is a certificate, and the library."""
        try:
            import c2pa  # noqa: F401
        except ImportError:
            return False
        return bool(self.chain)

    def embedded(self, image: bytes, kind: str, facts: dict[str, Any], title: str = "synthetic image") -> bytes:
        """An image with a C2PA manifest that says that a model made it, and how.

        Args:
            image: a whole file.
            kind: png, jpg or webp.
        """
        import c2pa

        secret = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        manifest = {
            "claim_generator_info": [{"name": "rayproj", "version": __version__}],
            "title": title,
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}]},
                },
                {"label": ASSERTION, "data": facts},
            ],
        }
        signed = io.BytesIO()
        with (
            c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}}) as context,
            c2pa.Signer.from_info(c2pa.C2paSignerInfo(self.algorithm, self.chain, secret, None)) as signer,
            c2pa.Builder(manifest, context) as builder,
        ):
            builder.sign(signer, KINDS[kind], io.BytesIO(image), signed)
        return signed.getvalue()

    def sidecar(self, sha256: str, facts: dict[str, Any], files: Mapping[str, str] | None = None) -> bytes:
        """JSON that says of what has this hash how it was made.

        Args:
            files: of a dataset, `Dataset.beside`.
        """
        public = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        said = {
            "generator": f"rayproj {__version__}",
            "digital_source_type": SOURCE_TYPE,
            "sha256": sha256,
            "facts": facts,
            **({"files": dict(files)} if files else {}),
            "algorithm": self.algorithm,
            "public_key": public.decode(),
            "certificate": self.chain.decode(),
        }
        signed = canonical(said)
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            signature = self.key.sign(signed)
        else:
            signature = self.key.sign(signed, ec.ECDSA(hashes.SHA256()))
        return to_json({**said, "signature": base64.b64encode(signature).decode()})

    def sign_dataset(self, dataset: Dataset) -> None:
        """Put a sidecar into a complete dataset, on its header, the hashes of its shards and of what is beside them."""
        said = dataset.header.provenance
        names = ["model_commit", "model_step", "seed", "plan", "private", "watermark", "policy", "safety"]
        names += ["upscaled_from", "upscaler", "upscaler_commit", "upscaler_seed"]
        facts = {name: said[name] for name in names if name in said}
        facts |= {"name": dataset.header.name, "samples": dataset.header.num_samples}
        dataset.store.write(OF_DATASET, self.sidecar(dataset.manifest_hash(), facts, dataset.beside()))


def canonical(said: dict[str, Any]) -> bytes:
    """What is signed: the JSON without its signature."""
    return to_json({name: value for name, value in said.items() if name != "signature"})


def facts_of(
    provenance: dict[str, Any], prompt: str, seed: int, guidance: float, steps: int, conditions: Mapping[str, str]
) -> dict[str, Any]:
    """What is stated of one image. Of the prompt only its hash: whoever knows it can check it.

    Args:
        provenance: of the plan by which it was drawn.
        conditions: label and properties, whatever the model calls them -> what was asked for.
    """
    private = provenance["private"]
    return {
        "model_commit": provenance["model_commit"],
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest() if prompt else "",
        "seed": seed,
        "guidance": guidance,
        "steps": steps,
        "privacy": private and {name: private[name] for name in ("epsilon", "delta", "ledger")},
        "watermark": provenance.get("watermark", {}).get("key", ""),
        "conditions": dict(conditions),
    }


def check(path: str, trust: str = "") -> Verdict:
    """Whether an image or dataset is what its signer signed. A sidecar counts only where an image has no manifest in it:
    anybody can put one beside it.

    Args:
        path: an image, or the URI of a dataset.
        trust: a PEM file with the certificates (or, for sidecars, public keys) of those who are trusted; "": nobody.

    Raises:
        UserError: there is no such file, or the trusted ones cannot be read.
    """
    anchors = read_anchors(trust)
    if Store(path).exists("dataset.json"):
        return _check_dataset(path, anchors)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error}); give an image, or the URI of a dataset.") from error
    beside = Path(path + SIDECAR)
    if has_manifest(data) or not beside.exists():
        found = check_manifest(path, data, anchors)
        if found.form != "none" or not beside.exists():
            return found
    return check_sidecar(path, beside.read_bytes(), sha256_hex(data), anchors)


def read_anchors(trust: str) -> bytes:
    """The certificates or public keys of those who are trusted; b"" of "".

    Raises:
        UserError: the file cannot be read, or holds neither.
    """
    if not trust:
        return b""
    try:
        found = Path(trust).read_bytes()
        if not _keys(found) + _certificates(found):
            raise ValueError("nothing is in it")
    except OSError as error:
        raise UserError(f"'{trust}', whom to trust, cannot be read ({error}); give a PEM file.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"'{trust}', whom to trust, has no certificate or public key; give a PEM file.") from error
    return found


def _keys(anchors: bytes) -> list[Any]:
    """Every public key of a PEM file."""
    return [serialization.load_pem_public_key(one) for one in re.findall(PEM % (b"PUBLIC KEY", b"PUBLIC KEY"), anchors)]


def _certificates(anchors: bytes) -> list[x509.Certificate]:
    """Every certificate of a PEM file."""
    return [x509.load_pem_x509_certificate(one) for one in re.findall(PEM % (b"CERTIFICATE", b"CERTIFICATE"), anchors)]


def _check_dataset(uri: str, anchors: bytes) -> Verdict:
    dataset = Dataset.open(uri)
    if not dataset.store.exists(OF_DATASET):
        return Verdict(uri, "none", problems=(f"it has no {OF_DATASET}",))
    if not dataset.complete:
        return Verdict(uri, "signed sidecar", problems=("shards are missing",))
    verdict = check_sidecar(uri, dataset.store.read(OF_DATASET), dataset.manifest_hash(), anchors, dataset.beside())
    changed = []
    for record in dataset.records().values():
        try:
            if sha256_hex(dataset.store.read(record.object)) != record.sha256:
                changed.append(f"the shard {record.object} was changed")
        except FileNotFoundError:
            changed.append(f"the shard {record.object} is missing")
    return Verdict(uri, verdict.form, verdict.signer, verdict.trusted, (*verdict.problems, *changed), verdict.facts)


def check_sidecar(
    file: str, sidecar: bytes, sha256: str, anchors: bytes = b"", files: Mapping[str, str] | None = None
) -> Verdict:
    """Whether a sidecar is of what has this hash, and as it was signed. Whatever it holds, it may be anybody's.

    Args:
        files: as of `Signer.sidecar`, as they are now.
    """
    try:
        said = json.loads(sidecar)
        key: Any = serialization.load_pem_public_key(said["public_key"].encode())
        signature, signed = base64.b64decode(said["signature"]), canonical(said)
        chain = x509.load_pem_x509_certificates(said["certificate"].encode()) if said["certificate"] else []
        facts, stated, signed_files = dict(said["facts"]), str(said["sha256"]), dict(said.get("files", {}))
        signer, vouched = _name(key, chain), _vouched(key, chain, anchors)
        same_key = not chain or chain[0].public_key() == key
    except Exception as error:  # what reads keys and certificates has too many ways to fail at what somebody made up
        return Verdict(file, "signed sidecar", "nobody", problems=(f"the sidecar cannot be read ({_short(error)})",))
    wrong = []
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, signed)
        else:
            key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, TypeError, AttributeError):
        wrong.append("the sidecar was changed after it was signed")
    if stated != sha256:
        wrong.append(f"the contents were changed: their SHA-256 is {sha256[:16]}…, signed was {stated[:16]}…")
    if not same_key:
        wrong.append("the certificate is of another key")
    there = files or {}
    for path in sorted({*there, *signed_files}):
        if path not in signed_files:
            wrong.append(f"{path} is none of what was signed")
        elif there.get(path) != signed_files[path]:
            wrong.append(f"{path} {'was changed' if path in there else 'is missing'}")
    return Verdict(file, "signed sidecar", signer, vouched, tuple(wrong), facts)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _name(key: PublicKey, chain: Sequence[x509.Certificate]) -> str:
    if chain:
        return chain[0].subject.rfc4514_string()
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"the key {hashlib.sha256(encoded).hexdigest()[:16]}"


def _vouched(key: PublicKey, chain: Sequence[x509.Certificate], anchors: bytes) -> bool | None:
    """Whether one of the anchors is the key, or issued the chain that ends in it, each certificate in its time."""
    if not anchors:
        return None
    if key in _keys(anchors):
        return True
    trusted = _certificates(anchors)
    now = datetime.now(UTC)
    for certificate, issuer in zip(chain, [*chain[1:], None], strict=False):  # of a bare key there is no chain
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            return False
        if certificate in trusted or any(_issued(certificate, anchor) for anchor in trusted):
            return True
        if issuer is None or not _issued(certificate, issuer):
            return False
    return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        if not issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
        certificate.verify_directly_issued_by(issuer)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return True


def need_c2pa(why: str = "") -> Any:
    """The library that reads C2PA manifests.

    Raises:
        UserError: it is not installed.
    """
    try:
        import c2pa
    except ImportError:
        raise UserError(f"{why}C2PA manifests are read by c2pa-python; pip install 'rayproj[provenance]'.") from None
    return c2pa


def has_manifest(data: bytes) -> bool:
    """Whether a file seems to have a C2PA manifest: a JUMBF box of that label (Technical Specification 2.1, 11.1.4)."""
    return b"jumb" in data and b"c2pa\0" in data


def check_manifest(file: str, data: bytes, anchors: bytes = b"") -> Verdict:
    """Whether an image is as its C2PA manifest says.

    Raises:
        UserError: the library is not installed.
    """
    c2pa = need_c2pa()
    settings: dict[str, Any] = {"verify": {"verify_trust": True}}
    if trusted := _certificates(anchors):
        pem = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in trusted)
        settings["trust"] = {"trust_anchors": pem.decode()}
    try:
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Reader(None, io.BytesIO(data), context=context) as reader,
        ):
            manifest, results = reader.get_active_manifest() or {}, reader.get_validation_results() or {}
    except c2pa.C2paError.ManifestNotFound:
        return Verdict(file, "none", problems=("the file has no C2PA manifest, and there is no sidecar",))
    except c2pa.C2paError.NotSupported:
        return Verdict(
            file, "none", problems=("it is no image of a kind that can have a C2PA manifest; give an image",)
        )
    except c2pa.C2paError as error:
        return Verdict(file, "C2PA manifest", "nobody", problems=(f"it cannot be read: {error}",))
    failures = results.get("activeManifest", {}).get("failure", [])
    codes = [f["code"] for f in failures]
    wrong = tuple(
        WRONG.get(f["code"], f"{f['code']}: {f.get('explanation', '')}") for f in failures if f["code"] != UNTRUSTED
    )
    signed, facts = manifest.get("signature_info", {}), {}
    for assertion in manifest.get("assertions", []):
        if assertion["label"] == ASSERTION and isinstance(assertion["data"], dict):  # anybody can sign anything
            facts = assertion["data"]
    signer = ", ".join(filter(None, (signed.get("common_name"), signed.get("issuer"))))
    return Verdict(file, "C2PA manifest", signer, UNTRUSTED not in codes if anchors else None, wrong, facts)


UNTRUSTED = "signingCredential.untrusted"
WRONG = {  # C2PA Technical Specification 2.1, 15.2.2 "Failure codes"
    "assertion.dataHash.mismatch": "the picture was changed after it was signed",
    "assertion.hashedURI.mismatch": "what the manifest states was changed after it was signed",
    "claimSignature.mismatch": "the claim was changed after it was signed",
    "signingCredential.invalid": "the certificate is not fit for signing",
    "signingCredential.expired": "the certificate had expired",
}


def write_keys(folder: str) -> list[Path]:
    """A private key, its certificate and that of the authority that issued it, for trying things out: nobody trusts it.

    Returns:
        key.pem, certificate.pem (the chain), authority.pem (for --trust).

    Raises:
        UserError: there are such files already, or they cannot be written.
    """
    files = [Path(folder, name) for name in ("key.pem", "certificate.pem", "authority.pem")]
    if there := [str(file) for file in files if file.exists()]:
        raise UserError(f"'{there[0]}' is there already; give another folder, a lost key cannot be made again.")
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("rayproj test authority", root, "rayproj test authority", root, authority=True)
    leaf = _certificate("rayproj test signer", own, "rayproj test authority", root, authority=False)
    secret = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain = [one.public_bytes(serialization.Encoding.PEM) for one in (leaf, authority)]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        files[0].touch(mode=0o600)
        for file, data in zip(files, (secret, b"".join(chain), chain[1]), strict=True):
            file.write_bytes(data)
    except OSError as error:
        raise UserError(f"Nothing can be written to '{folder}' ({error}); give another folder.") from error
    return files


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, by: ec.EllipticCurvePrivateKey, authority: bool
) -> x509.Certificate:
    """As C2PA asks for (Technical Specification 2.1, 14.5.1)."""
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage |= {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    now = datetime.now(UTC)

    def named(common: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "a test, not to be trusted")
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=365))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    if not authority:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purposes, critical=False)
    return builder.sign(by, hashes.SHA256())
