"""Make the embedded data sets from their originals (see THIRD_PARTY_NOTICES.md for where those come from).

    python rayproj/data/embedded/make.py FASHION_MNIST_FOLDER EMOJI64_PARQUET

Fashion-MNIST: the first 1,000 training and 200 test images of each class, in the originals' order, as idx.gz files.
Emoji: every image composited on white and reduced to 32 pixels (premultiplied, antialiased), as lossless
WebP; five minutes on one core.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayproj.data.sources.idx import read_idx

HERE = Path(__file__).resolve().parent
PER_CLASS = {"train": 1000, "t10k": 200}
EMOJI_SIZE = 32


def write_idx(path: Path, array: np.ndarray) -> None:
    """The idx format: zero, zero, 8 (unsigned byte), number of axes, sizes as big-endian words, data."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes(), compresslevel=9, mtime=0))


def make_fashion_mnist(folder: Path) -> None:
    for part, count in PER_CLASS.items():
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        write_idx(HERE / f"{part}-images-idx3-ubyte.gz", images[chosen])
        write_idx(HERE / f"{part}-labels-idx1-ubyte.gz", labels[chosen])


def reduced(data: bytes) -> bytes:
    """One emoji as lossless WebP, RGB, on white. Pillow premultiplies when it resizes RGBA in mode "RGBa"."""
    small = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")
    small = small.resize((EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    buffer = io.BytesIO()
    flat.save(buffer, "webp", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def make_emoji(path: Path) -> None:
    table = pq.read_table(path)
    images = pa.array([reduced(image) for image in table["image"].to_pylist()], pa.binary())
    table = table.set_column(table.schema.get_field_index("image"), "image", images)
    pq.write_table(table, HERE / "emoji32.parquet", compression="zstd")


if __name__ == "__main__":
    make_fashion_mnist(Path(sys.argv[1]))
    make_emoji(Path(sys.argv[2]))
