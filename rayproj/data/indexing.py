"""Webdataset tars that others wrote, read where they lie: a header and records beside them make them a dataset."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rayproj.data.dataset import Dataset, Field, Header, ShardRecord
from rayproj.data.encodings import ENCODINGS
from rayproj.data.reader import key_of
from rayproj.errors import UserError
from rayproj.storage.store import Store, sha256_hex, to_json

# Extension of a member -> the encoding that reads it.
IMAGES = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}
TEXTS = {"cls": ("label", "int"), "txt": ("caption", "str")}


@dataclass
class _Tar:
    """What one tar holds."""

    path: str
    sha256: str
    size: int
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)  # key -> extension -> what was found
    wrong: dict[str, str] = field(default_factory=dict)  # key -> reason


def index(uri: str, label: str = "label", skip: bool = False) -> dict[str, Any]:
    """Write dataset.json and the records for the tars of a folder. The tars stay as they are; nothing in them is unpickled.

    Args:
        label: the key of a JSON member that is the class, where there is no `cls` member.
        skip: leave out what is broken, with a record of it in the header; else it is an error.

    Returns:
        Samples, shards, fields, and how many were left out for which reason.

    Raises:
        UserError: there is no tar, something is broken, or the samples are not alike enough to be stacked.
    """
    store = Store(uri)
    files = store.list()
    if below := next((path for path in files if path.endswith("/dataset.json")), None):
        raise UserError(
            f"'{uri}' holds datasets already, such as {below.rpartition('/')[0]}; give a folder of others' tars."
        )
    paths = [path for path in files if path.endswith(".tar") and not path.startswith("shards/")]
    if not paths:
        raise UserError(f"There is no tar in '{uri}'; give a folder of webdataset tars.")
    tars = [_look(path, store.read(path)) for path in sorted(paths)]
    kinds = Counter(frozenset(sample) for tar in tars for sample in tar.samples.values())
    if not kinds:
        raise UserError(f"No sample in the {len(tars)} tars of '{uri}' can be read ({_first(tars)}).")
    usual = kinds.most_common(1)[0][0]
    fields, members, classes = _fields(usual, tars, label)
    for tar in tars:
        for key, sample in list(tar.samples.items()):
            if reason := _unlike(sample, usual, fields, members):
                tar.wrong[key] = reason
                del tar.samples[key]
    wrong = {tar.path: tar.wrong for tar in tars if tar.wrong}
    if wrong and not skip:
        count = sum(map(len, wrong.values()))
        raise UserError(f"{count} samples or tars of '{uri}' are broken: {_first(tars)}. Mend them, or say --skip.")
    whole = [tar for tar in tars if tar.samples]
    header = Header(
        name=store.uri.rpartition("/")[2],
        fields=fields,
        num_samples=sum(len(tar.samples) for tar in whole),
        shard_size=max(len(tar.samples) for tar in whole),
        classes=classes,
        provenance={
            "indexed": store.uri,
            "skipped": {str(n): dict(sorted(tar.wrong.items())) for n, tar in enumerate(whole) if tar.wrong},
            "left_out": {tar.path: dict(sorted(tar.wrong.items())) for tar in tars if not tar.samples},
        },
        sizes=tuple(len(tar.samples) for tar in whole),
        members=members,
    )
    dataset = Dataset.create(uri, header)
    for number, tar in enumerate(whole):
        labels = [_label(sample, members) for sample in tar.samples.values()] if classes else []
        counts = Counter(classes[int(name)] if name not in classes else name for name in labels)
        record = ShardRecord(
            number, tar.path, tar.sha256, tar.size, len(tar.samples), dict(counts), "index", 0.0, time.time()
        )
        dataset.store.put_once(f"commits/{number:06d}.json", to_json(asdict(record)))
    reasons = Counter(reason.partition(":")[0] for tar in tars for reason in tar.wrong.values())
    return {
        "samples": header.num_samples,
        "shards": header.num_shards,
        "fields": {name: [f.encoding, *f.shape] for name, f in fields.items()},
        "classes": list(classes),
        "left_out": dict(reasons),
    }


def _look(path: str, data: bytes) -> _Tar:
    """Read every member of a tar."""
    found = _Tar(path, sha256_hex(data), len(data))
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, extension = key_of(member.name)
                file = tar.extractfile(member)
                assert file is not None
                content = file.read()
                if len(content) != member.size:
                    raise tarfile.ReadError("it ends in the middle of a member")
                try:
                    found.samples.setdefault(key, {})[extension] = _content(extension, content)
                except (ValueError, OSError, SyntaxError) as error:
                    found.wrong[key] = f"does not decode: {extension}: {error}"
    except (tarfile.TarError, EOFError) as error:
        # Its end is missing, and with it the guarantee that what is there is all of it.
        return _Tar(path, found.sha256, found.size, wrong={path: f"torn tar: {error}"})
    for key in found.wrong:
        found.samples.pop(key, None)
    return found


def _content(extension: str, data: bytes) -> Any:
    """What decides whether samples are alike: the shape of an array, a text, the scalars of a JSON."""
    kind = extension.rpartition(".")[2].lower()
    if kind in IMAGES:
        return ENCODINGS[IMAGES[kind]].decode(data).shape
    if kind in ("npy", "safetensors"):
        return ENCODINGS[kind].decode(data).shape
    if extension in TEXTS:
        return data.decode().strip()
    if extension == "json":
        values = json.loads(data)
        return {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    return None


def _fields(
    usual: frozenset[str], tars: list[_Tar], label: str
) -> tuple[dict[str, Field], dict[str, str], tuple[str, ...]]:
    """The fields of the usual sample, their members, and the names of the classes."""
    samples = [s for tar in tars for s in tar.samples.values() if frozenset(s) == usual]
    fields, members, classes = dict[str, Field](), dict[str, str](), tuple[str, ...]()
    for extension in sorted(usual):
        first, kind = samples[0][extension], extension.rpartition(".")[2].lower()
        if isinstance(first, tuple):
            encoding = IMAGES.get(kind, kind)
            alone = sum(e.rpartition(".")[2].lower() in IMAGES for e in usual) == 1
            name = "image" if kind in IMAGES and alone else extension.partition(".")[0]
            shapes = Counter(sample[extension] for sample in samples)
            fields[name], members[name] = Field(encoding, shapes.most_common(1)[0][0]), extension
        elif extension in TEXTS:
            name, encoding = TEXTS[extension]
            fields[name], members[name] = Field(encoding), extension
            if name == "label":
                classes = _names(sample[extension] for sample in samples)
        elif isinstance(first, dict):
            keys = Counter(frozenset(sample[extension]) for sample in samples).most_common(1)[0][0]
            for name in sorted(keys):
                values = [sample[extension][name] for sample in samples if name in sample[extension]]
                if name == label and "label" not in fields:
                    fields["label"], members["label"], classes = Field("int"), f"json.{name}", _names(values)
                elif name not in fields:
                    kinds = {type(value) for value in values}
                    whole = "int" if kinds <= {int, bool} else "float" if kinds <= {int, bool, float} else "str"
                    fields[name] = Field("str" if str in kinds else whole)
    return fields, members, classes


def _names(labels: Any) -> tuple[str, ...]:
    """Names of classes in their order: numbers by size, up to the largest; words by the alphabet."""
    found = {str(label) for label in labels}
    if all(name.isdigit() for name in found):
        return tuple(map(str, range(max(map(int, found)) + 1)))
    return tuple(sorted(found))


def _unlike(sample: dict[str, Any], usual: frozenset[str], fields: dict[str, Field], members: dict[str, str]) -> str:
    """Why a sample cannot stand beside the others; "" if it can."""
    if lacking := sorted(usual - set(sample)):
        return f"missing member: {lacking[0]}"
    for name, extension in members.items():
        if isinstance(sample.get(extension), tuple) and sample[extension] != fields[name].shape:
            theirs, ours = ("x".join(map(str, shape)) for shape in (sample[extension], fields[name].shape))
            return f"another shape: {extension} is {theirs}, most are {ours}"
    in_json = [members.get(name, f"json.{name}") for name in fields]
    in_json = [extension.removeprefix("json.") for extension in in_json if extension.startswith("json.")]
    if lacking := [name for name in in_json if name not in sample.get("json", {})]:
        return f"missing key: {lacking[0]}"
    return ""


def _label(sample: dict[str, Any], members: dict[str, str]) -> str:
    member = members["label"]
    return str(sample["json"][member.removeprefix("json.")] if member.startswith("json.") else sample[member])


def _first(tars: list[_Tar]) -> str:
    tar = next(tar for tar in tars if tar.wrong)
    key, reason = next(iter(tar.wrong.items()))
    return f"{tar.path}, {key}: {reason}" if key != tar.path else f"{tar.path}: {reason}"
