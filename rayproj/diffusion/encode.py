"""Images to a dataset of latents, shard by shard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.diffusion.autoencoder import Codec
from rayproj.storage.store import Store, from_json


def latent_header(images: Header, autoencoder: str) -> Header:
    """The plan of the latent dataset: one latent for each image, in the same shards, with its label, captions and the like.

    The field "moments" [2C, h, w] holds mean and standard deviation of the scaled latent, so that a training step from
    the cache can draw the posterior's noise anew, as a step without it would.
    """
    shape = from_json(Store(autoencoder).read("result.json"))["latent_shape"]
    scalars = {name: field for name, field in images.fields.items() if field.encoding not in ("png", "npy")}
    return Header(
        name=f"{images.name} latents",
        fields={"moments": Field("npy", (2 * shape[0], *shape[1:])), **scalars},
        num_samples=images.num_samples,
        shard_size=images.shard_size,
        classes=images.classes,
        licence=images.licence,
        attribution=images.attribution,
        provenance={"autoencoder": Store(autoencoder).uri, "images": images.name},
    )


class Encoder:
    """Makes a shard of latents from the same shard of images. Config keys: "images", "autoencoder", "batch"."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device, self.batch = device, int(config["batch"])
        self.codec = Codec.load(config["autoencoder"], device)
        dataset = Dataset.open(config["images"])
        self.header = dataset.header
        self.kept = [name for name, field in dataset.header.fields.items() if field.encoding not in ("png", "npy")]
        self.reader = Reader(dataset, fields=["image", *self.kept])

    def make(self, shard: int) -> list[dict[str, Any]]:
        ids = np.array(self.header.shard_range(shard))
        samples = self.reader.gather(ids)
        rows = []
        for part in torch.from_numpy(samples["image"]).split(self.batch):
            rows.append(torch.cat(self.codec.encode(part.to(self.device)), dim=1).cpu())
        moments = torch.cat(rows).float().numpy()
        scalars = {name: samples[name].tolist() for name in self.kept}
        return [
            {"key": f"{i:08d}", "moments": moments[k], **{name: values[k] for name, values in scalars.items()}}
            for k, i in enumerate(ids)
        ]
