"""Obfuscations: images a second, against straightforward PIL, NumPy and SciPy; and what they cost a training.

On a CPU both sides have one thread, and the processor's time is what counts, which others on the machine change less. On a
machine with a GPU ours run there, and the peer on one core of its CPU. What repaints does it by the same network on both
sides, whose weights, and the patches, are random here: that is no matter of speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch

from rayproj.benchmarks.obfuscation_plain import PLAIN, learned
from rayproj.benchmarks.runtime import Row, row
from rayproj.classifiers.augment import AugmentConfig
from rayproj.classifiers.networks import ClassifierConfig
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Field, Header
from rayproj.obfuscation import OBFUSCATIONS, Assets, AssetsConfig, ObfuscateConfig, scenes
from rayproj.obfuscation.assets import fitted
from rayproj.obfuscation.styles import StyleNetwork

SIDE, BATCH, ROUNDS = 224, 32, 5
SLOW = 5e-3  # seconds an image from which on the peer is slow
TRAINED, STEPS = 64, 10  # images a step, and steps a round
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*(_obfuscation(name) for name in OBFUSCATIONS), _training(32, 1), _training(32, 3)]
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _medians(*ways: Callable[[], object]) -> list[float]:
    """Seconds of each, over rounds in which they take turns, after one that is not counted."""
    found: list[list[float]] = [[] for _ in ways]
    for number in range(ROUNDS + 1):
        for k, way in enumerate(ways):
            taken = _seconds(way)
            if number:
                found[k].append(taken)
    return [statistics.median(values) for values in found]


def _rows(step: int, size: int) -> torch.Tensor:
    index = torch.arange(size, device=DEVICE)
    return torch.stack([index, torch.full_like(index, step), torch.zeros_like(index)], 1)


def _obfuscation(name: str) -> Row:
    images = fitted(scenes.pictures(BATCH), (3, SIDE, SIDE))
    plain = [np.ascontiguousarray(x) for x in images.permute(0, 2, 3, 1).numpy()]
    patches, styles = fitted(scenes.pictures(4), (3, 48, 48)), StyleNetwork(6, 6).eval().requires_grad_(False)
    peers = PLAIN | learned([np.ascontiguousarray(x) for x in patches.permute(0, 2, 3, 1).numpy()], styles)
    known, row_of = Assets.load(AssetsConfig(), DEVICE), _rows(0, BATCH)
    if OBFUSCATIONS[name].needs:
        known = Assets(scenes.pictures(4).to(DEVICE), patches.to(DEVICE), deepcopy(styles).to(DEVICE))
    photos = list(fitted(scenes.pictures(16), (3, SIDE, SIDE)).permute(0, 2, 3, 1).contiguous().numpy())
    there, kind = images.to(DEVICE), OBFUSCATIONS[name]
    records = kind.draw(row_of, 0).records()
    # Ours with the drawing of the parameters; the peer is given them.
    ours, peer = _medians(
        lambda: kind.draw(row_of, 0)(there, known),
        lambda: [peers[name](image, p, photos) for image, p in zip(plain, records, strict=True)],
    )
    what = "PIL, NumPy, SciPy" if peer / BATCH < SLOW else "PIL, NumPy, SciPy: slow"
    goal = 3.0 if peer / BATCH >= SLOW else None
    return row(f"{name}, {SIDE}x{SIDE}", "1/s", BATCH / ours, what, BATCH / peer, "higher", goal)


def _training(side: int, channels: int) -> Row:
    """Updates of a classifier with half of the images under one of the training obfuscations that need nothing learned, and
    without."""
    header = Header(
        "b", {"image": Field("png", (channels, side, side)), "label": Field("int")}, 1, 1, tuple("abcdefghij")
    )
    images = fitted(scenes.pictures(TRAINED), (channels, side, side)).to(DEVICE)
    label = torch.arange(TRAINED, device=DEVICE) % 10

    def trained(names: list[str]) -> Callable[[], None]:
        augment = AugmentConfig(obfuscate=ObfuscateConfig(names, 0.5))
        task = ClassificationTask(ClassifierConfig(), header, 0, augment)
        model = task.build().to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters())

        def steps() -> None:
            for step in range(STEPS):
                batch = {"image": images, "label": label, "row": _rows(step, TRAINED)}
                optimizer.zero_grad()
                task.losses(model, batch).mean().backward()
                optimizer.step()

        return steps

    on, off = _medians(trained(["training"]), trained([]))
    what = f"training with obfuscations, {channels}x{side}x{side}, batch {TRAINED}"
    return row(what, "1/s", STEPS * TRAINED / on, "without", STEPS * TRAINED / off, "higher")
