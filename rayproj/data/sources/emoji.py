"""The captioned emoji in the package: 3,372 emoji, each in 4 styles, at 32 pixels.

Tone and gender are attributes of drawings: useful to test methods with, no claim about people follows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from rayproj.data.encodings import of_picture
from rayproj.data.sources.base import Channels, Source, SourceConfig
from rayproj.data.sources.fashion_mnist import EMBEDDED
from rayproj.errors import UserError

LABELS = ("category", "style", "tone", "gender")
ATTRIBUTES = ("caption", "tags", "category", "subcategory", "style", "tone", "gender", "role", "base", "license")
ATTRIBUTION = (
    "Google Noto emoji (Apache-2.0); Twemoji, Twitter, Inc. and contributors (CC-BY 4.0); Microsoft Fluent emoji (MIT); "
    "OpenMoji, images, captions and tags (CC-BY-SA 4.0)"
)


def open(config: SourceConfig) -> Source:
    import pyarrow.parquet as pq

    by = config.label_column if config.label_column != "label" else "category"
    if by not in LABELS:
        raise UserError(f"source.label_column={by!r} is no label of the emoji; choose one of {', '.join(LABELS)}.")
    unknown = set(config.attributes) - set(ATTRIBUTES)
    if unknown:
        raise UserError(f"The emoji have no attribute {sorted(unknown)[0]!r}; there are {', '.join(ATTRIBUTES)}.")
    attributes = tuple(config.attributes) or ATTRIBUTES
    table = pq.read_table(EMBEDDED / "emoji32.parquet")
    classes = tuple(sorted(set(table[by].to_pylist())))
    grey = config.channels is Channels.grey
    size = config.image_size

    def rows() -> Iterator[dict[str, Any]]:
        for row in table.to_pylist():
            picture = Image.open(io.BytesIO(row["image"])).convert("L" if grey else "RGB")
            if picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BICUBIC)
            yield {
                "key": row["key"].replace("/", "_"),
                "image": of_picture(picture),
                "label": classes.index(row[by]),
                "split": "train",
                # Tone and gender variants of a role are near duplicates: they go together.
                "group": row["role"],
                **{name: row[name] for name in attributes},
            }

    return Source("emoji", classes, attributes, "per style", ATTRIBUTION, rows)
