"""What images show: their features, and captions of them. Both are pluggable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayproj.config import below
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.folders import loading

Embedder = Callable[[Tensor], Tensor]
"""uint8 images [B, C, H, W] to features fp32 [B, D]."""

Captioner = Callable[[Tensor, np.ndarray], list[str]]
"""uint8 images [B, C, H, W] and their features [B, D] to a caption of each."""

FEATURE = "feature"


@dataclass
class EmbedderConfig:
    """What tells which failures look alike."""

    model: str = ""  # folder of an image model of transformers; "": EfficientNet-lite0, which comes with this package
    size: int = 64  # of EfficientNet-lite0: side to which images are resized

    def problems(self) -> list[str]:
        return below(1, "discover.embedder", self, "size")


@dataclass
class CaptionConfig:
    """What describes the images that come without a description."""

    model: str = ""  # folder of an image-to-text model of transformers
    prompt: str = ""  # that it is given, if it takes one
    tokens: int = 24  # of a caption, at most
    # Without a model, an image is described by the caption of the most similar one of these, by the embedder's features: a
    # dataset with images, and the field with their captions. "": the emoji that come with this package.
    images: str = ""
    field: str = "caption"

    def problems(self) -> list[str]:
        return [] if self.tokens > 0 else ["discover.captions.tokens must be positive."]


def open_embedder(config: EmbedderConfig, device: str) -> Embedder:
    """The embedder of a config, ready.

    Raises:
        UserError: there is no such model.
    """
    return _Transformers(config.model, device) if config.model else EfficientNetLite0Features(config.size, device)


class _Transformers:
    def __init__(self, folder: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.device = device
        with loading(f"discover.embedder.model='{folder}'", "an image model of transformers and its image processor"):
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
        model = getattr(model, "vision_model", model)  # of those for images and texts
        self.model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        out = self.model(pixel_values=_pixels(self.processor, images, self.device))
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = out.last_hidden_state.mean(1)
        return pooled.flatten(1).float()


def open_captioner(config: CaptionConfig, known: str, device: str) -> Captioner:
    """The captioner of a config, ready.

    Args:
        known: the dataset that `Indexer` wrote, where the config names no model.

    Raises:
        UserError: there is no such model.
    """
    return _Written(config, device) if config.model else Retrieval(known)


class _Written:
    """By a model of transformers: BLIP, GIT and the like, or an encoder with a decoder such as ViT-GPT2."""

    def __init__(self, config: CaptionConfig, device: str) -> None:
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForImageTextToText,
            AutoTokenizer,
            VisionEncoderDecoderModel,
        )

        self.config, self.device = config, device
        wanted = "an image-to-text model, its image processor and its tokenizer"
        with loading(f"discover.captions.model='{config.model}'", wanted):
            self.processor = AutoImageProcessor.from_pretrained(config.model, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
            pair = (
                AutoConfig.from_pretrained(config.model, local_files_only=True).model_type == "vision-encoder-decoder"
            )
            kind: Any = VisionEncoderDecoderModel if pair else AutoModelForImageTextToText
            model = kind.from_pretrained(config.model, local_files_only=True)
        self.model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, features: np.ndarray) -> list[str]:
        given = {"pixel_values": _pixels(self.processor, images, self.device)}
        if self.config.prompt:
            words = self.tokenizer([self.config.prompt] * len(images), return_tensors="pt").to(self.device)
            given |= {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"]}
        out = self.model.generate(**given, max_new_tokens=self.config.tokens, do_sample=False)
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text.strip().removeprefix(self.config.prompt).strip() for text in texts]


class Retrieval:
    """The caption of the known image whose features are the most similar, by cosine."""

    def __init__(self, known: str) -> None:
        dataset = Dataset.open(known)
        found = Reader(dataset).gather(np.arange(dataset.header.num_samples))
        self.texts, self.features = found["caption"], _unit(found[FEATURE])

    def __call__(self, images: Tensor, features: np.ndarray) -> list[str]:
        return [str(self.texts[i]) for i in (_unit(features) @ self.features.T).argmax(1)]


def index_header(config: CaptionConfig, embedder: EmbedderConfig, images: Dataset, dimensions: int) -> Header:
    """Of the dataset with the features and captions of the known images.

    Raises:
        UserError: they have no captions.
    """
    if config.field not in images.header.fields:
        raise UserError(
            f"{images.uri} has no field '{config.field}'; give discover.captions.field the one with captions."
        )
    return Header(
        name=f"{images.header.name}, features",
        fields={FEATURE: Field("npy", (dimensions,)), "caption": Field("str")},
        num_samples=images.header.num_samples,
        shard_size=images.header.shard_size,
        classes=(),
        licence=images.header.licence,
        attribution=images.header.attribution,
        provenance={
            "images": images.uri,
            "manifest": images.manifest_hash(),
            "field": config.field,
            "embedder": {"model": embedder.model, "size": embedder.size},
            "private": images.header.provenance.get("private"),
        },
    )


class Indexer:
    """Makes the shards of that dataset. Config keys: "out", "batch"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.header, self.batch = Dataset.open(config["out"]).header, int(config["batch"])
        said = self.header.provenance
        self.embed = open_embedder(EmbedderConfig(**said["embedder"]), device)
        self.field = said["field"]
        self.reader = Reader(Dataset.open(said["images"]), ["image", self.field])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        columns = self.reader.gather(ids)
        features = in_batches(self.embed, torch.from_numpy(columns["image"]), self.batch)
        return [
            {"key": f"{i:08d}", FEATURE: features[k], "caption": str(columns[self.field][k])} for k, i in enumerate(ids)
        ]


def in_batches(of: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> np.ndarray:
    """A function of images, so many at once."""
    return torch.cat([of(images[i : i + batch]).cpu() for i in range(0, len(images), batch)]).numpy()


def _pixels(processor: Any, images: Tensor, device: str) -> Tensor:
    x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    given = processor(images=list(x.cpu()), return_tensors="pt", input_data_format="channels_first")
    return given["pixel_values"].to(device)


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found
