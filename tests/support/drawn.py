"""Images of several models, as jobs/generate.py writes them but without a model: what is in a picture says whose it is."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard

STRENGTH = 40  # of red for each step of strength, at the left edge


def picture(strength: int, text: str, side: int = 16, channels: int = 3) -> np.ndarray:
    """uint8 [C, H, W]: noise of its prompt's own, behind a column that says the model's strength."""
    noise = np.random.default_rng(zlib.crc32(text.encode())).integers(0, 256, (channels, side, side), dtype=np.uint8)
    noise[:, :, 0] = STRENGTH * strength
    return noise


def write(
    uri: str,
    strength: int,
    prompts: Sequence[str],
    side: int = 16,
    field: str = "prompt",
    copies: int = 1,
    blank: Sequence[str] = (),
) -> Dataset:
    """A dataset with an image of each prompt, or several; of some prompts a black one."""
    texts = [text for text in prompts for _ in range(copies)]
    fields = {"image": Field("png", (3, side, side)), field: Field("str")}
    dataset = Dataset.create(uri, Header("drawn", fields, len(texts), 4, (), provenance={"model": uri}))
    for shard in range(dataset.header.num_shards):
        rows = [
            {"key": f"{i:06d}", "image": picture(strength, texts[i], side) * (texts[i] not in blank), field: texts[i]}
            for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, rows, "test", 0.1)
    return dataset
