"""Images to a dataset of latents, and captions to embeddings of their tokens, shard by shard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.diffusion.autoencoder import Codec
from rayproj.diffusion.conditions import LOW, TEXT
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.errors import UserError
from rayproj.storage.store import Store, from_json


def latent_header(
    images: Header,
    autoencoder: str,
    properties: dict[str, list[str]],
    text: TextEncoder | None = None,
    low: int = 0,
    encoding: str = "npy",
) -> Header:
    """The plan of the latent dataset: one latent for each image, in the same shards, with its label, captions and the like.

    The field "moments" [2C, h, w] holds mean and standard deviation of the scaled latent, so that a training step from
    the cache can draw the posterior's noise anew, as a step without it would. A caption's embeddings [T, D] are the field
    text_<caption>. A property, which is a text of the images, becomes the number of its value. A smaller copy of the
    image, of side `low`, is the field "low". Latents and embeddings are written in `encoding`: npy or safetensors.

    Raises:
        UserError: the images have no such caption or property.
    """
    made = from_json(Store(autoencoder).read("result.json"))
    factor = made["image_shape"][-1] // made["latent_shape"][-1]
    sides = images.fields["image"].shape[1:]
    if any(side % factor for side in sides):
        raise UserError(
            f"The images of '{images.name}' are {sides[0]}x{sides[1]}, and the autoencoder takes sides that are multiples "
            f"of {factor}; import them so."
        )
    fields = {name: field for name, field in images.fields.items() if not field.array}
    captions = text.config.captions if text else []
    for name in [*properties, *captions]:
        if name not in fields or fields[name].encoding != "str":
            texts = ", ".join(sorted(n for n, f in fields.items() if f.encoding == "str")) or "none"
            raise UserError(f"The images of '{images.name}' have no text '{name}'; they have {texts}.")
    fields |= {name: Field("int", values=tuple(values)) for name, values in properties.items()}
    fields |= {f"{TEXT}_{name}": Field(encoding, text.shape) for name in captions if text}
    if low:
        if sides[0] != sides[1]:
            raise UserError(
                f"encode_latents.low is for square images; those of '{images.name}' are {sides[0]}x{sides[1]}."
            )
        fields[LOW] = Field("png", (images.fields["image"].shape[0], low, low))
    return Header(
        name=f"{images.name} latents",
        fields={"moments": Field(encoding, (2 * made["latent_shape"][0], *(s // factor for s in sides))), **fields},
        num_samples=images.num_samples,
        shard_size=images.shard_size,
        classes=images.classes,
        licence=images.licence,
        attribution=images.attribution,
        provenance={
            "autoencoder": Store(autoencoder).uri,
            "images": images.name,
            **({TEXT: text.describe()} if text else {}),
        },
    )


def smaller(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [B, C, side, side] of uint8 images, antialiased bicubic."""
    small = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8)


def text_encoder(config: TextConfig, device: str) -> TextEncoder | None:
    """None if there is no caption to encode."""
    return TextEncoder(config, device) if config.captions else None


class Encoder:
    """Makes a shard of latents from the same shard of images.

    Config keys: "images", "autoencoder", "batch", "properties", "text" (a TextConfig), "low".
    """

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device, self.batch, self.properties = device, int(config["batch"]), config["properties"]
        self.low = int(config.get("low", 0))
        self.codec = Codec.load(config["autoencoder"], device)
        self.text = text_encoder(configuration.from_dict(TextConfig, config["text"]), device)
        dataset = Dataset.open(config["images"])
        self.header = dataset.header
        self.kept = [name for name, field in dataset.header.fields.items() if not field.array]
        self.reader = Reader(dataset, fields=["image", *self.kept])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        samples = self.reader.gather(ids)
        rows = []
        for part in torch.from_numpy(samples["image"]).split(self.batch):
            rows.append(torch.cat(self.codec.encode(part.to(self.device)), dim=1).cpu())
        columns: dict[str, Any] = {name: samples[name].tolist() for name in self.kept}
        columns["moments"] = torch.cat(rows).float().numpy()
        if self.low:
            columns[LOW] = smaller(torch.from_numpy(samples["image"]), self.low).numpy()
        columns |= {f"{TEXT}_{name}": self._embedded(columns[name]) for name in self._captions()}
        for name, values in self.properties.items():
            number = {value: k for k, value in enumerate(values)}
            columns[name] = [number.get(value, -1) for value in columns[name]]
        return [{"key": f"{i:08d}", **{name: column[k] for name, column in columns.items()}} for k, i in enumerate(ids)]

    def _captions(self) -> list[str]:
        return self.text.config.captions if self.text else []

    def _embedded(self, texts: list[str]) -> np.ndarray:
        """fp16, which is as exact as anything made of them needs, at half the bytes."""
        assert self.text
        parts = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        return torch.cat([self.text(part) for part in parts]).half().cpu().numpy()
