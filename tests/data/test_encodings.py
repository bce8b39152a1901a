"""What is stored is what is read, by other libraries too."""

import io

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.encodings import ENCODINGS
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.storage.store import IntegrityError


def picture(channels: int) -> np.ndarray:
    ramp = np.linspace(0, 255, 24 * 16).reshape(24, 16)
    return np.stack([np.roll(ramp, 3 * c, axis=1) for c in range(channels)]).astype(np.uint8)


@pytest.mark.parametrize("name", ["png", "webp", "jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_that_pillow_reads(name: str, channels: int) -> None:
    image = picture(channels)
    data = ENCODINGS[name].encode(image)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    found = ENCODINGS[name].decode(data)
    found = found[:1] if channels == 1 else found  # WebP has no grey
    assert np.array_equal(np.moveaxis(found, 0, -1).reshape(theirs.shape), theirs)
    difference = np.abs(found.astype(int) - image)
    assert difference.max() == 0 if name != "jpg" else difference.mean() < 4
    assert data == ENCODINGS[name].encode(image), "the same image gives the same bytes"


@pytest.mark.parametrize("name", ["npy", "safetensors"])
def test_arrays_are_those_that_their_libraries_read(name: str) -> None:
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    data = ENCODINGS[name].encode(array.T)
    theirs = np.load(io.BytesIO(data)) if name == "npy" else safetensors.numpy.load(data)["x"]
    assert np.array_equal(theirs, array.T) and np.array_equal(ENCODINGS[name].decode(data), array.T)
    with pytest.raises(ValueError):
        ENCODINGS[name].decode(data[:20])


def test_nothing_is_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ENCODINGS["npy"].decode(buffer.getvalue())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_dataset_of_any_encoding(channels: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    names = {"png": (channels, 24, 16), "webp": (channels, 24, 16), "npy": (2, 3), "safetensors": (2, 3)}
    header = Header("x", {n: Field(n, shape) for n, shape in names.items()}, 70, 70, ())
    dataset, rng = Dataset.create(str(tmp_path), header), np.random.default_rng(0)
    arrays = [
        {"png": rng.integers(0, 256, names["png"], dtype=np.uint8), "npy": rng.normal(size=(2, 3)).astype(np.float32)}
        for _ in range(70)
    ]
    samples = [a | {"webp": a["png"], "safetensors": a["npy"]} for a in arrays]
    commit_shard(dataset, 0, [{"key": f"{i:08d}", **s} for i, s in enumerate(samples)], "test", 0.1)
    for threads in (1, 3):
        found = Reader(dataset, threads=threads).gather(np.arange(70))
        for name in names:
            assert np.array_equal(found[name], np.stack([s[name] for s in samples])), name


def test_a_member_that_does_not_decode_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    dataset = Dataset.create(str(tmp_path), Header("x", {"z": Field("safetensors", (2,))}, 2, 2, ()))
    from rayproj.data import encodings, writer

    broken = {**ENCODINGS, "safetensors": encodings.Encoding(lambda array: b"x", lambda data: data, np.float32, False)}  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(writer, "ENCODINGS", broken)
    commit_shard(dataset, 0, [{"key": str(i), "z": np.zeros(2, np.float32)} for i in range(2)], "test", 0.1)
    with pytest.raises(IntegrityError, match=r"In shard 0 of .* the member '0\.z\.safetensors' does not decode"):
        Reader(dataset).gather(np.arange(2))
