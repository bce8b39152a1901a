"""An obfuscated dataset: the images of another under each of several obfuscations, one obfuscation after the other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayproj.config import below, from_dict
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.imagenet import ImageFolders
from rayproj.data.reader import Reader
from rayproj.data.writer import Sample
from rayproj.obfuscation.assets import Assets, AssetsConfig
from rayproj.obfuscation.base import SEVERITIES
from rayproj.obfuscation.registry import CLEAN, DRAW, chosen, obfuscate, of_name
from rayproj.storage.store import Store

NOTICE = (
    "Obfuscations rewritten from the descriptions of Stimberg et al. 2023, for training and measuring filters; not the "
    "benchmark's own images, and not comparable with them."
)


@dataclass
class WriteConfig:
    """Which images, under which obfuscations, to where."""

    images: str = "???"  # a dataset, or a folder of ImageNet with one for each class
    out: str = "???"
    names: list[str] = field(default_factory=lambda: ["all"])  # as in augment.obfuscate.names
    clean: bool = True  # the images as they are come first
    assets: AssetsConfig = field(default_factory=AssetsConfig)
    samples: int = 0  # of the images, the first; 0: all
    draws: int = 1  # of the parameters of each image
    severity: int = 0  # 1 to 5: a fifth of each range of strength; 0: the whole of it, as the benchmark has it
    size: int = 224  # side of ImageNet's images
    encoding: str = ""  # png, webp or jpg; "": as the images have it
    shard_size: int = 256
    batch: int = 64

    def problems(self) -> list[str]:
        names = ("draws", "shard_size", "batch", "size")
        found = [f"obfuscate.{n} must be positive." for n in names if getattr(self, n) < 1]
        found += below(0, "obfuscate", self, "samples")
        if self.severity not in (0, *SEVERITIES):
            found.append(f"obfuscate.severity is 1 to 5, or 0 for the whole ranges, not {self.severity}.")
        if self.encoding not in ("", "png", "webp", "jpg"):
            found.append(f"obfuscate.encoding is png, webp or jpg, not '{self.encoding}'.")
        return found


def open_images(uri: str, size: int) -> Any:
    """The images of a dataset, or of class folders: what has a `header` and `gather`, and an `uri`.

    Raises:
        UserError: neither is there.
    """
    local = Store(uri).local_path()
    if local is not None and Path(local).is_dir() and not (Path(local) / "dataset.json").exists():
        return ImageFolders(str(local), size)
    reader: Any = Reader(Dataset.open(uri))
    reader.header, reader.uri = reader.dataset.header, reader.dataset.uri
    return reader


def header_of(config: WriteConfig, seed: int) -> Header:
    """What is to be written.

    Raises:
        UserError: images, names or assets that are not there.
    """
    images = open_images(config.images, config.size)
    source: Header = images.header
    names = chosen(config.names, config.assets)
    assets = Assets.load(config.assets)
    for name in names:
        of_name(name).require(assets)
    shown = (CLEAN, *names) if config.clean else names
    picture = source.fields["image"]
    fields = {
        **source.fields,
        "image": replace(picture, encoding=config.encoding or picture.encoding),
        "image_id": Field("str"),
        "obfuscation": Field("int", values=shown),
        "parameters": Field("str"),
    }
    manifest = {"manifest": images.dataset.manifest_hash()} if isinstance(images, Reader) else {}
    count = min(config.samples or source.num_samples, source.num_samples)
    return replace(
        source,
        name=f"{source.name}, obfuscated",
        fields=fields,
        num_samples=count * config.draws * len(shown),
        shard_size=config.shard_size,
        sizes=(),
        members={},
        provenance={
            "obfuscated_from": images.uri,
            **manifest,
            "obfuscations": {n: {f: asdict(r) for f, r in of_name(n).ranges().items()} for n in names},
            "draws": config.draws,
            "severity": config.severity,
            "assets": assets.provenance,
            "seed": seed,
            "notice": NOTICE,
            # What a model promised of the private images that it saw goes on to what is made of its images.
            **{name: source.provenance[name] for name in ("private", "private_source") if source.provenance.get(name)},
        },
    )


class Writer:
    """Makes shards. Values: "config", as of `WriteConfig`, and "out"."""

    def __init__(self, values: dict[str, Any], device: str) -> None:

        self.config, self.device = from_dict(WriteConfig, values["config"]), device
        self.header = Dataset.open(values["out"]).header
        self.images = open_images(self.config.images, self.config.size)
        self.assets = Assets.load(self.config.assets, device)

    def make(self, shard: int) -> list[Sample]:
        """The samples of a shard: number i is image i modulo their number, under obfuscation i divided by it."""
        numbers = np.asarray(self.header.shard_range(shard))
        names = self.header.fields["obfuscation"].values
        per_name = self.header.num_samples // len(names)
        found: list[Sample] = []
        for which in np.unique(numbers // per_name):
            here = numbers[numbers // per_name == which] % per_name
            for begin in range(0, len(here), self.config.batch):
                found += self._samples(int(which), names[which], here[begin : begin + self.config.batch], per_name)
        return found

    def _samples(self, which: int, name: str, numbers: np.ndarray, per_name: int) -> list[Sample]:
        seed, draws = self.header.provenance["seed"], self.header.provenance["draws"]
        index, view = numbers // draws, numbers % draws
        columns = self.images.gather(index)
        images = torch.from_numpy(columns["image"]).to(self.device)
        records: list[dict[str, Any]] = [{}] * len(numbers)
        if name != CLEAN:
            row = torch.from_numpy(np.stack([index, np.zeros_like(index), view], 1)).to(self.device)
            images, records = obfuscate(name, images, row, seed, self.assets, self.config.severity)
        found = []
        for k, image in enumerate(images.cpu().numpy()):
            sample = {n: columns[n][k] for n in self.images.header.fields if n in self.header.fields}
            sample = {n: v.item() if isinstance(v, np.generic) else v for n, v in sample.items()}
            own = str(columns["image_id"][k]) if "image_id" in columns else f"{index[k]:08d}"
            sample |= {"image_id": own if draws == 1 else f"{own}{DRAW}{view[k]}", "obfuscation": which, "image": image}
            key = f"{which * per_name + int(numbers[k]):08d}"
            found.append({"key": key, **sample, "parameters": json.dumps(records[k], sort_keys=True)})
        return found
