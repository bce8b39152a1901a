"""What rules judge images and captions by: a number for each sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rayproj import classifiers
from rayproj.data.dataset import Dataset
from rayproj.data.encodings import luminance, of_picture, to_picture
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.quality import nearest
from rayproj.responsibility.personal import personal

Columns = dict[str, np.ndarray]
Score = Callable[[Columns], np.ndarray]
"""Columns of n samples, "image" uint8 [n, C, H, W] and texts, to n numbers."""


class Scorer(Enum):
    sharpness = "sharpness"  # variance of the Laplacian of the luminance, which blur takes away
    contrast = "contrast"  # standard deviation of the luminance, of 255
    words = "words"  # of the text
    pii = "pii"  # e-mail and IP addresses, telephone, card and account numbers (IBAN) in the text
    blocked = "blocked"  # words of the text that are on a list
    model = "model"  # what a network says of the image: unsafe, made by AI, shows text, looks good
    confidence = "confidence"  # probability that a classifier gives to the image's own label
    # How near the nearest image of another dataset is, such as what a generator learned from: cosine of features, or root of
    # the mean squared difference of pixels, of 255. Pairs are shown in pairs-<rule>.png: of private images a private output.
    similarity = "similarity"
    pixels = "pixels"


NEAREST = (Scorer.similarity, Scorer.pixels)
NUDENET = "nudenet"
UNCOVERED = (6, 7, 8, 10, 18)  # of its outputs, the first four of which are a box: buttocks, breast, genitalia, anus


@dataclass
class RuleConfig:
    """Samples whose score lies outside of [at_least, at_most] are left out, for the reason that the rule's name is."""

    scorer: Scorer = Scorer.sharpness
    at_least: float | None = None
    at_most: float | None = None
    text: str = "caption"  # field that words, pii and blocked read
    words: list[str] = field(default_factory=list)  # of blocked: whole words, in any case
    # Of model: an ONNX file that takes fp32 [n, 3, size, size] in [0, 1] and gives [n] or [n, k], of which the greatest of
    # `outputs` counts; or, as detectors do, [n, k, places], of which the greatest counts. "nudenet": the detector of that
    # package, and of what it knows what no clothes cover.
    model: str = ""
    size: int = 224
    outputs: list[int] = field(default_factory=lambda: [-1])
    classifier: str = ""  # of confidence: a run dir of jobs/train_classifier.py
    against: str = ""  # of similarity and pixels: a dataset

    def outside(self, score: np.ndarray) -> np.ndarray:
        """bool [n]: which scores lie outside of the bounds. What is not a number does."""
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return ~((score >= low) & (score <= high))

    def problems(self) -> list[str]:
        if self.size < 1:
            return [f"A rule's size must be at least 1, not {self.size}."]
        if self.at_least is None and self.at_most is None:
            return ["A rule needs at_least, at_most or both: it leaves out what scores outside of them."]
        if self.scorer is Scorer.blocked and not self.words:
            return ["A rule with scorer=blocked needs words."]
        if self.scorer is Scorer.model and not self.model:
            return [
                "A rule with scorer=model needs the path of an ONNX file in model, or nudenet: no classifier of unsafe, "
                "AI-made or low-quality images comes with this package. Give one, or take the rule out."
            ]
        if not self.outputs:
            return ["A rule's outputs are empty; [-1] is the last one."]
        if self.scorer is Scorer.confidence and not self.classifier:
            return ["A rule with scorer=confidence needs the run dir of a classifier in classifier."]
        if self.scorer in NEAREST and not self.against:
            return [f"A rule with scorer={self.scorer.value} needs a dataset in against."]
        return []


def scorer(rule: RuleConfig, device: str = "cpu") -> Score:
    """The scorer of a rule.

    Raises:
        UserError: a model or dataset that is not there or cannot be used.
    """
    if rule.scorer is Scorer.confidence:
        return _confidence(rule, device)
    if rule.scorer in NEAREST:
        return Nearest(rule, device)
    if rule.scorer is Scorer.sharpness:
        return lambda columns: _sharpness(columns["image"])
    if rule.scorer is Scorer.contrast:
        return lambda columns: luminance(columns["image"]).std((1, 2))
    if rule.scorer is Scorer.model:
        return _model(rule)
    count = {
        Scorer.words: lambda text: len(text.split()),
        Scorer.pii: lambda text: sum(1 for _ in personal(text)),
        Scorer.blocked: lambda text: len(re.findall(_any_of(rule.words), text, re.IGNORECASE)),
    }[rule.scorer]
    return lambda columns: np.array([float(count(str(text))) for text in columns[rule.text]])


def _sharpness(images: np.ndarray) -> np.ndarray:
    y = luminance(images)
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    return laplacian.var((1, 2))


def _any_of(words: list[str]) -> str:
    return rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)"


def _confidence(rule: RuleConfig, device: str) -> Score:
    model = classifiers.load(rule.classifier, device)

    @torch.no_grad()
    def score(columns: Columns) -> np.ndarray:
        logits = model(torch.from_numpy(columns["image"]).to(device)).double()
        label = torch.from_numpy(columns["label"]).to(device).clamp(min=0)  # one without a label is of no class
        found = logits.softmax(1).gather(1, label[:, None])[:, 0].cpu().numpy()
        return np.where(columns["label"] < 0, np.nan, found)

    return score


class Nearest:
    """How near the nearest image of another dataset is, and which that is.

    Attributes:
        places: of all that were scored, in their order: indices into that dataset.
    """

    def __init__(self, rule: RuleConfig, device: str) -> None:
        self.rule, self.reader = rule, Reader(Dataset.open(rule.against), ["image"])
        self.extract: Any = None if rule.scorer is Scorer.pixels else EfficientNetLite0Features(device=device)
        total = self.reader.dataset.header.num_samples
        parts = [np.arange(i, min(i + 512, total)) for i in range(0, total, 512)]
        self.known = np.concatenate([self._of(self.reader.gather(part)["image"]) for part in parts])
        self.places: list[np.ndarray] = []

    def _of(self, images: np.ndarray) -> np.ndarray:
        """fp32 [n, d]: pixels, or features of length one."""
        if self.extract is None:
            return images.reshape(len(images), -1).astype(np.float32)
        features = self.extract(torch.from_numpy(images)).cpu().numpy()
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def __call__(self, columns: Columns) -> np.ndarray:
        own = self._of(columns["image"])
        if own.shape[1:] != self.known.shape[1:]:
            raise UserError(
                f"The images of '{self.rule.against}' have another shape, so their pixels cannot be compared."
            )
        squared, place = nearest(own, self.known)
        self.places.append(place)
        return np.sqrt(squared / own.shape[1]) if self.extract is None else 1 - squared / 2


def _model(rule: RuleConfig) -> Score:
    if rule.model == NUDENET:
        rule = replace(rule, model=file_of(rule.model), size=320, outputs=list(UNCOVERED))
    if not Path(rule.model).is_file():
        raise UserError(f"The model '{rule.model}' of a rule is not there; check the path.")
    try:
        import onnxruntime
    except ImportError:
        raise UserError("A rule with scorer=model needs onnxruntime; pip install onnxruntime.") from None
    try:
        session = onnxruntime.InferenceSession(rule.model, providers=onnxruntime.get_available_providers())
    except Exception as error:
        raise UserError(f"The model '{rule.model}' cannot be loaded: {error}") from error
    name = session.get_inputs()[0].name

    def score(columns: Columns) -> np.ndarray:
        out: Any = session.run(None, {name: resized(columns["image"], rule.size)})[0]
        found = np.asarray(out, np.float64)
        found = found[:, None] if found.ndim == 1 else found
        return found[:, rule.outputs].reshape(len(found), -1).max(1)

    return score


def file_of(model: str) -> str:
    """The file of a rule's model: of "nudenet" that in its package, which is not imported, as it would need OpenCV.

    Raises:
        UserError: the package is not installed.
    """
    if model != NUDENET:
        return model
    spec = find_spec(NUDENET)
    if spec is None or spec.origin is None:
        raise UserError("A rule with model=nudenet needs that package; pip install 'rayproj[safety]'.")
    return str(Path(spec.origin).with_name("320n.onnx"))


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """fp32 [n, 3, size, size] in [0, 1] of uint8 [n, C, H, W]; antialiased bicubic."""
    found = []
    for image in images:
        picture = to_picture(image).convert("RGB")
        found.append(of_picture(picture.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(found).astype(np.float32) / 255
