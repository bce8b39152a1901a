"""The classifiers that are examined, whatever they were written with: uint8 images [B, C, H, W] to probabilities."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.classifiers.model import digest
from rayproj.data.dataset import Dataset
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.folders import loading
from rayproj.storage.store import Store

EFFICIENTNET = "efficientnet_lite0"


@dataclass
class ExaminedConfig:
    """A classifier and what it is given."""

    # A run dir of jobs/train_classifier.py, a folder of `rayproj export`, a folder of transformers with a model for image
    # classification, a file of torch.export (.pt2), TorchScript (.pt) or ONNX, or "efficientnet_lite0", whose ImageNet
    # weights come with this package.
    model: str = "???"
    # Of files alone, which do not say it: the names of the classes, or a file with one on each line (of efficientnet_lite0
    # too), the side to which images are resized, and the mean and deviation per channel of (x / 255), if they take floats.
    classes: list[str] = field(default_factory=list)
    classes_file: str = ""
    size: int = 0  # 0: as the images are; efficientnet_lite0: 224
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    probabilities: bool = False  # whether the output is probabilities, not logits

    def problems(self) -> list[str]:
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            return ["A classifier's mean and std go together, one of each for a channel, std positive."]
        return [] if self.size >= 0 else [f"A classifier's size must be at least 0, not {self.size}."]


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
        UserError: there is none, or it cannot be loaded, or the names of its classes are not known.
    """
    path = Path(config.model)
    if config.model == EFFICIENTNET:
        return _EfficientNet(config, device)
    if path.is_file():
        return _Onnx(config, path) if path.suffix == ".onnx" else _Program(config, path, device)
    if (path / "model.pt2").is_file():
        return _Program(config, path / "model.pt2", device)
    if (path / "config.json").is_file():
        return _Transformers(config.model, device)
    if Store(config.model).exists("config.yaml"):
        return _Run(config.model, device)
    raise UserError(
        f"There is no classifier at '{config.model}'; give the run dir of jobs/train_classifier.py, a folder of 'rayproj "
        f"export' or of transformers, a file of torch.export, TorchScript or ONNX, or {EFFICIENTNET}."
    )


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [B, C, H, W] to fp32 in [0, 255] of that side, antialiased bicubic; 0 leaves them."""
    x = images.float()
    if size and tuple(x.shape[2:]) != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        x = x.round().clamp(0, 255)
    return x


def prepared(images: Tensor, config: ExaminedConfig) -> Tensor:
    """What a network of floats takes: of that side, normalised, grey images as three equal channels where asked."""
    x = resized(images, config.size) / 255
    if not config.mean:
        return x
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (config.mean, config.std))
    return (x.expand(-1, len(mean), -1, -1) if x.shape[1] == 1 else x).sub(mean).div(std)


class _Run:
    def __init__(self, run_dir: str, device: str) -> None:
        self.device, self.model = device, classifiers.load(run_dir, device)
        header = Dataset.open(configuration.value(Store(run_dir).read("config.yaml"), "data")).header
        self.classes, self.channels = header.classes, header.fields["image"].shape[0]
        self.digest = _of_weights(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.channels:
            raise UserError(f"The classifier takes {self.channels} channels, and the images have {images.shape[1]}.")
        return self.model(images.to(self.device)).softmax(1)


class _EfficientNet:
    def __init__(self, config: ExaminedConfig, device: str) -> None:
        self.model = EfficientNetLite0Features(config.size or 224, device)
        self.classes = _names(config, config.model) or tuple(f"ImageNet {k}" for k in range(1000))
        self.digest = _of_weights(self.model.model)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model.logits(images).float().softmax(1)


class _Transformers:
    def __init__(self, folder: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.device = device
        with loading(f"The classifier '{folder}'", "a model for image classification and its image processor"):
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        self.model = model.to(device).eval().requires_grad_(False)
        names = model.config.id2label
        self.classes = tuple(str(names[k]) for k in range(len(names)))
        self.digest = _of_weights(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        given = self.processor(images=list(x.cpu()), return_tensors="pt", input_data_format="channels_first")
        return self.model(pixel_values=given["pixel_values"].to(self.device)).logits.float().softmax(1)


class _Program:
    """Of torch.export or TorchScript. One that `rayproj export` wrote takes uint8, and its classes stand beside it."""

    def __init__(self, config: ExaminedConfig, path: Path, device: str) -> None:
        self.config, self.device = config, device
        described = path.parent / "config.json"
        own = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        self.raw = own.get("input", {}).get("dtype") == "uint8"
        try:
            if path.suffix == ".pt2":
                self.model: Any = torch.export.load(path).module().to(device)
            else:
                self.model = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:
            raise UserError(f"The classifier '{path}' cannot be loaded ({str(error).splitlines()[0]}).") from error
        self.classes = _names(config, config.model) or tuple(own.get("classes", ()))
        _require_names(self.classes, config.model)
        self.digest = _of_file(path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        out = self.model(images if self.raw else prepared(images, self.config)).float()
        return _checked(out if self.config.probabilities else out.softmax(1), self.classes, self.config.model)


class _Onnx:
    def __init__(self, config: ExaminedConfig, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"The classifier '{path}' needs onnxruntime; pip install onnxruntime.") from None
        self.config = config
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        except Exception as error:
            raise UserError(f"The classifier '{path}' cannot be loaded ({str(error).splitlines()[0]}).") from error
        given = self.session.get_inputs()[0]
        self.name, self.raw = given.name, given.type == "tensor(uint8)"
        self.batch = given.shape[0] if isinstance(given.shape[0], int) else 0  # which a file may have been written for
        self.classes = _names(config, config.model)
        _require_names(self.classes, config.model)
        self.digest = _of_file(path)

    def __call__(self, images: Tensor) -> Tensor:
        x = resized(images, self.config.size).to(torch.uint8) if self.raw else prepared(images, self.config)
        parts = [self._run(part) for part in x.cpu().split(self.batch or len(x))]
        out = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        return _checked(out if self.config.probabilities else out.softmax(1), self.classes, self.config.model)

    def _run(self, x: Tensor) -> np.ndarray:
        """Of so many images as a batch takes, or fewer, which are filled up."""
        whole = torch.cat([x, x[:1].expand(max(0, self.batch - len(x)), *x.shape[1:])])
        return np.asarray(self.session.run(None, {self.name: whole.numpy()})[0])[: len(x)]


def _names(config: ExaminedConfig, model: str) -> tuple[str, ...]:
    if not config.classes_file:
        return tuple(config.classes)
    try:
        lines = Path(config.classes_file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"classes_file='{config.classes_file}' of '{model}' cannot be read ({error}).") from error
    return tuple(line.strip() for line in lines if line.strip())


def _require_names(classes: tuple[str, ...], model: str) -> None:
    if not classes:
        raise UserError(f"The classifier '{model}' does not name its classes; give them in classes or classes_file.")


def _checked(out: Tensor, classes: tuple[str, ...], model: str) -> Tensor:
    if out.ndim != 2 or out.shape[1] != len(classes):
        raise UserError(f"The classifier '{model}' gives {tuple(out.shape)[1:]} numbers for {len(classes)} classes.")
    return out


def _of_weights(model: torch.nn.Module) -> str:
    return digest(model.state_dict())[:16]


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
