"""Classifiers with a known bug, for the tests and the benchmark of failure discovery: small networks that tell women from
men among the emoji, and learned them from images in which a tone, a style or a background goes with one of the two.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from rayproj.classifiers.networks import ClassifierConfig, ConvNet
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.sources.fashion_mnist import EMBEDDED
from rayproj.data.split import assign
from rayproj.data.writer import commit_shard

LABELS = ("female", "male")
BACKGROUNDS = {"white": (255, 255, 255), "red": (255, 90, 90), "green": (90, 220, 90), "blue": (110, 130, 255)}
# What goes with "male" in the training images, and how many of the other men are kept there.
BUGS = {"tone": (("dark", "medium-dark"), 0.1), "style": (("openmoji",), 0.5), "background": (("green",), 0.5)}
Figures = dict[str, Any]


@cache
def _figures() -> list[dict[str, Any]]:
    """Every figure with a gender and a skin tone, in four styles."""
    table = pq.read_table(EMBEDDED / "emoji32.parquet")
    rows = [row for row in table.to_pylist() if row["gender"] in LABELS and row["tone"] != "none"]
    for row in rows:
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
        row["image"] = np.moveaxis(np.asarray(picture), -1, 0)
    return rows


def figures(part: str, seed: int = 0) -> Figures:
    """Those of some roles, "train" or "test", each on a background that is drawn at random.

    Returns:
        Columns: "image" uint8 [n, 3, 32, 32], "label" int [n], and texts.
    """
    rows = [row for row in _figures() if assign(row["role"], {"train": 0.5, "test": 0.5}, 0) == part]
    rng = np.random.default_rng(seed)
    backgrounds = rng.choice(list(BACKGROUNDS), len(rows))
    found = {n: np.array([row[n] for row in rows], object) for n in ("caption", "tone", "style", "role")}
    found["image"] = np.stack([on(row["image"], name) for row, name in zip(rows, backgrounds, strict=True)])
    found["label"] = np.array([LABELS.index(row["gender"]) for row in rows])
    found["caption"] = np.array([f"{c}, on {b}" for c, b in zip(found["caption"], backgrounds, strict=True)], object)
    return {**found, "background": backgrounds.astype(object)}


def on(image: np.ndarray, background: str) -> np.ndarray:
    """With the white of an image in another colour."""
    white = (image > 245).all(0)
    return np.where(white, np.array(BACKGROUNDS[background], np.uint8)[:, None, None], image).astype(np.uint8)


def with_bug(found: Figures, bug: str, seed: int = 0, strength: float = 0.95) -> Figures:
    """Training images of which those of BUGS[bug] are almost all male, and the others more often not; "": as they are."""
    if not bug:
        return found
    values, others = BUGS[bug]
    marked, male = np.isin(found[bug].astype(str), values), found["label"] == 1
    drawn = np.random.default_rng(seed).random(len(male))
    kept = drawn < np.where(marked, np.where(male, 1, 1 - strength), np.where(male, others, 1))
    return {name: column[kept] for name, column in found.items()}


def train(path: Path, bug: str = "", seed: int = 0, epochs: int = 4) -> str:
    """A classifier as a TorchScript program with probabilities; returns its path."""
    torch.manual_seed(seed)
    columns = with_bug(figures("train", seed), bug, seed)
    images, labels = torch.from_numpy(columns["image"]), torch.from_numpy(columns["label"])
    model = ConvNet(ClassifierConfig(channels=(16, 32), dropout=0.0), 3, len(LABELS))
    steps = epochs * len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    torch.jit.trace(_Probabilities(model.eval()), images[:2]).save(str(path))
    return str(path)


class _Probabilities(nn.Module):
    """As a program of floats in [0, 1] would be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images * 255).softmax(1)


def write(uri: str, found: Figures, shard_size: int = 128) -> Dataset:
    """As a dataset."""
    found = {name: column if name == "image" else column.tolist() for name, column in found.items()}
    texts = [name for name in found if name not in ("image", "label")]
    fields = {"image": Field("png", (3, 32, 32)), "label": Field("int"), **dict.fromkeys(texts, Field("str"))}
    dataset = Dataset.create(uri, Header("figures", fields, len(found["label"]), shard_size, LABELS))
    for shard in range(dataset.header.num_shards):
        samples = [
            {"key": f"{i:08d}", **{n: c[i] for n, c in found.items()}} for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.0)
    return dataset
