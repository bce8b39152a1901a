"""Encode images to a dataset of latents with a trained autoencoder, shard by shard, by a pool of actors.

python jobs/encode_latents.py configs/encode_latents.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rayproj.data.dataset import WEIGHTS, Dataset, Header, Inputs
from rayproj.diffusion.encode import latent_header, text_encoder
from rayproj.diffusion.text import TextConfig
from rayproj.runtime.command import command
from rayproj.runtime.producer import Pool, PoolConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    images: dict[str, str] = field(default_factory=dict)  # name of a part -> its images
    out: str = "???"  # the latents of a part go to <out>/<part>
    autoencoder: str = "???"  # run dir of jobs/train_autoencoder.py
    text: TextConfig = field(default_factory=TextConfig)
    properties: dict[str, list[str]] = field(default_factory=dict)  # a text of the images -> all that it can be
    encoding: str = "npy"  # of latents and embeddings in the shards; or safetensors
    low: int = 0  # side of a smaller copy of each image, for a model that makes it larger again; 0: none
    batch: int = 128  # images encoded at once by an actor
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        found = (
            [] if self.images else ["images must name at least one dataset, such as images.public=runs/data/public."]
        )
        if self.encoding not in ("npy", "safetensors"):
            found.append(f"encoding is npy or safetensors, not '{self.encoding}'.")
        return found + [f"{n} must be at least {k}." for n, k in (("low", 0), ("batch", 1)) if getattr(self, n) < k]


def shards_of(config: Config, inputs: Inputs) -> dict[str, Header]:
    """What is written, as far as it is known before the images and the autoencoder are there."""
    found = {}
    for part, uri in config.images.items():
        header = inputs.header(uri, partial(latents_of, config, uri))
        found[f"{config.out}/{part}"] = header.only(*(set(header.fields) - {"image"}))
    return found


def latents_of(config: Config, uri: str) -> Header:
    text = text_encoder(config.text, "cpu")
    images = Dataset.open(uri).header
    return latent_header(images, config.autoencoder, config.properties, text, config.low, config.encoding)


def main(config: Config) -> dict[str, Any]:
    with Run.open("encode_latents", config) as run:
        if run.result:
            return run.result
        parts = {}
        with Pool(run, config.pool) as pool:
            for part, uri in config.images.items():
                latents = Dataset.create(f"{config.out}/{part}", latents_of(config, uri))
                if (images := Store(uri)).exists(WEIGHTS):
                    latents.store.write(WEIGHTS, images.read(WEIGHTS))
                maker: dict[str, Any] = {"images": uri, "autoencoder": config.autoencoder, "batch": config.batch}
                maker |= {"properties": config.properties, "text": asdict(config.text), "low": config.low}
                parts[part] = pool.produce(latents, "rayproj.diffusion.encode:Encoder", maker)
        return run.finish({"parts": parts, "samples": sum(part["samples"] for part in parts.values())})


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
