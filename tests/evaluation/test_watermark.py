"""The watermark: its detector against the formula written out, its false positives against the bound, what it survives."""

from pathlib import Path

import numpy as np
import pytest
from scipy.fft import dctn

from rayproj.data.sources import SourceConfig, SourceKind, open_source
from rayproj.errors import UserError
from rayproj.evaluation import watermark
from rayproj.evaluation.watermark import detect, detect_crop, evidence, key_name, mark, pattern, read_key, survival

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture(scope="module")
def emoji() -> np.ndarray:
    samples = list(open_source(SourceConfig(kind=SourceKind.emoji, image_size=32, attributes=["style"])).samples())
    return np.stack([s["image"] for s in samples[:: len(samples) // 100]])[:100]


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Cut-outs of the two photographs that ship with scikit-learn, 64 of 128x128."""
    from sklearn.datasets import load_sample_images

    found = []
    for picture in load_sample_images().images:
        for i in range(32):
            top, left = 37 * (i % 8), 120 * (i // 8)
            found.append(np.moveaxis(picture[top : top + 128, left : left + 128], -1, 0))
    return np.stack(found)


def test_the_evidence_by_a_loop(emoji: np.ndarray) -> None:
    image = emoji[3]
    y = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    coefficients, found = dctn(y, norm="ortho"), []
    frequency = lambda i, j: np.hypot(i / 32, j / 32)  # noqa: E731
    inside = [(i, j) for i in range(32) for j in range(32) if watermark.LOW <= frequency(i, j) < watermark.HIGH]
    ring = lambda i, j: int((frequency(i, j) - watermark.LOW) / (watermark.HIGH - watermark.LOW) * watermark.RINGS)  # noqa: E731
    for i, j in inside:
        alike = [coefficients[p] for p in inside if ring(*p) == ring(i, j)]
        found.append(coefficients[i, j] / np.mean(np.square(alike)))
    np.testing.assert_allclose(evidence(image[None])[0], found, rtol=1e-9)


def test_a_mark_is_as_weak_as_was_asked_for_and_lies_in_its_band(emoji: np.ndarray) -> None:
    change = pattern(KEY, 32, 32)
    assert np.sqrt(np.square(change).mean()) == pytest.approx(1)
    spectrum = np.abs(dctn(change, norm="ortho"))
    frequency = np.hypot(*np.meshgrid(np.arange(32) / 32, np.arange(32) / 32, indexing="ij"))
    outside = (frequency < watermark.LOW) | (frequency >= watermark.HIGH)
    assert spectrum[outside].max() < 1e-9 and spectrum[~outside].min() == pytest.approx(spectrum.max())
    grey = np.full((1, 3, 32, 32), 128, np.uint8)
    error = mark(grey, KEY, 2.0).astype(float) - 128
    assert 10 * np.log10(255**2 / np.square(error).mean()) == pytest.approx(42.1, abs=0.3)


def test_false_positives_are_within_the_bound(emoji: np.ndarray, photographs: np.ndarray) -> None:
    """Over keys, as the bound is; of single images and of whole sets, which have much in common."""
    rng = np.random.default_rng(0)
    for images in (emoji, photographs[:8]):
        each, together = [], []
        for _ in range(200):
            key = rng.bytes(32)
            signs = watermark._signs(key, *images.shape[2:])
            a = evidence(images[:8])
            each += [watermark._judged(row, signs).chance for row in a]
            together.append(watermark._judged(a.sum(0), signs).chance)
        for chances in (each, together):
            for level in (0.5, 0.1, 0.02):
                rate = np.mean(np.array(chances) <= level)
                assert rate <= level + 3 * np.sqrt(level / len(together)), (level, rate)
    assert detect(mark(emoji, OTHER, 2.0), KEY).chance > 1e-3, "another's mark is none"


def test_marked_images_are_found(emoji: np.ndarray, photographs: np.ndarray) -> None:
    for images in (emoji, photographs):
        found = survival(mark(images, KEY, 2.0), KEY)
        assert found["as they are"]["chance"] < 1e-9 and found["JPEG 90"]["chance"] < 1e-6, found
        assert survival(images, KEY)["as they are"]["chance"] > 1e-3
    # Of 128x128 each by itself, and also after what people do to pictures.
    assert found["as they are"]["found"] >= 0.95 and found["JPEG 70"]["chance"] < 1e-6, found
    assert found["resized to 3/4"]["chance"] < 1e-6 and found["cut to 3/4"]["chance"] < 1e-3, found


def test_a_cut_out_is_found_where_it_was(photographs: np.ndarray) -> None:
    image = mark(photographs[:1], KEY, 4.0)[0]
    found = detect_crop(image[:, 17:113, 9:105], KEY, (128, 128))
    assert found.details == {"top": 17, "left": 9} and found.chance < 1e-3
    rng = np.random.default_rng(0)
    wrong = [detect_crop(image[:, 17:113, 9:105], rng.bytes(32), (128, 128)).chance for _ in range(50)]
    assert np.mean(np.array(wrong) <= 0.1) <= 0.2
    with pytest.raises(UserError, match="is no cut-out of one of 16x16"):
        detect_crop(image, KEY, (16, 16))


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "key").write_bytes(KEY)
    assert read_key(str(tmp_path / "key")) == KEY and len(key_name(KEY)) == 16 != key_name(OTHER)
    with pytest.raises(UserError, match="it needs at least 16"):
        read_key(str(tmp_path / "short"))
    with pytest.raises(UserError, match="make one with"):
        read_key(str(tmp_path / "none"))
