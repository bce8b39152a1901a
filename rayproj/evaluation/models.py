"""Classifiers behind one call: uint8 images [B, C, H, W] to probabilities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.storage.store import Store

EFFICIENTNET = "efficientnet_lite0"


@dataclass
class ExaminedConfig:
    """A classifier and what it is given."""

    # A run dir of jobs/train_classifier.py, an ONNX file of floats in [0, 1], or "efficientnet_lite0", whose weights
    # come with this package.
    model: str = "???"
    classes: list[str] = field(default_factory=list)  # names of an ONNX file's classes
    size: int = 0  # side to which images are resized; 0: as they are; efficientnet_lite0: 224


class Examined(Protocol):
    """A classifier.

    Attributes:
        classes: their names, in the order of the probabilities.
        digest: of its weights.
    """

    classes: tuple[str, ...]
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """fp32 probabilities [B, K] of uint8 images [B, C, H, W]."""
        ...


def open_classifier(config: ExaminedConfig, device: str) -> Examined:
    """A classifier, ready.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    if config.model == EFFICIENTNET:
        return _EfficientNet(config, device)
    if config.model.endswith(".onnx"):
        return _Onnx(config)
    return _Run(config.model, device)


class _Run:
    def __init__(self, run_dir: str, device: str) -> None:
        self.device, self.model = device, classifiers.load(run_dir, device)
        self.classes = Dataset.open(configuration.value(Store(run_dir).read("config.yaml"), "data")).header.classes
        self.digest = _of_weights(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.device)).softmax(1)  # type: ignore[no-any-return]


class _EfficientNet:
    def __init__(self, config: ExaminedConfig, device: str) -> None:
        self.model = EfficientNetLite0Features(config.size or 224, device)
        self.classes = tuple(f"ImageNet {k}" for k in range(1000))
        self.digest = _of_weights(self.model.model)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model.logits(images).float().softmax(1)


class _Onnx:
    def __init__(self, config: ExaminedConfig) -> None:
        if not Path(config.model).is_file() or not config.classes:
            raise UserError(f"The classifier '{config.model}' is to be an ONNX file, with the names of its classes.")
        import onnxruntime

        self.config, self.classes = config, tuple(config.classes)
        self.session = onnxruntime.InferenceSession(config.model, providers=onnxruntime.get_available_providers())
        self.digest = hashlib.sha256(Path(config.model).read_bytes()).hexdigest()[:16]

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        if self.config.size:
            x = F.interpolate(x, size=(self.config.size,) * 2, mode="bicubic", antialias=True, align_corners=False)
        name = self.session.get_inputs()[0].name
        return torch.from_numpy(np.asarray(self.session.run(None, {name: x.cpu().numpy()})[0], np.float32)).softmax(1)


def _of_weights(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
