"""An invisible watermark in every synthetic image, and its detector.

Spread spectrum (Cox et al. 1997, "Secure Spread Spectrum Watermarking for Multimedia") in the discrete cosine transform of
the whole image: the luminance gets the sum of all coefficients of a band of middle frequencies, each with a sign that a
secret key says. The detector needs the key, the size of the images as they were marked, and no original.

Let a_k be what an image has at the band's coefficients, divided by the mean square of those of like frequency, as the best
detector of a sign in Gaussian noise of that variance weighs them, and s_k the signs. Of an image that was not marked with
this key the s_k are fair coins, so by Hoeffding's inequality z = Σ s_k a_k / √(Σ a_k²) exceeds t with a probability of at
most exp(-t²/2), whatever the image. Of many images the a_k are summed first, so that the bound holds for a dataset too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from PIL import Image

from rayproj.data.dataset import Dataset
from rayproj.data.encodings import decode_image, luminance, of_picture, to_picture
from rayproj.data.reader import Reader
from rayproj.errors import UserError

# Of the band: frequency as a share of the highest there is; above it JPEG and resizing leave nothing.
LOW, HIGH = 0.12, 0.65
RINGS = 8  # of like frequency
KEY_BYTES = 16
CANDIDATES = 8  # places of a cut-out that are looked at closely
REAL = "real"  # the name of images without a mark
MARKED = 200  # images of a set in which it is looked for
CHANCE = 1e-3  # bound on an image without one that seems to have it


@dataclass
class WatermarkConfig:
    """Whether images are marked, and how strongly."""

    key: str = ""  # a file with the secret, of 16 bytes or more; "": no mark
    strength: float = 2.0  # root mean square of the change, of 255; 2 is a PSNR of 42 dB

    def problems(self) -> list[str]:
        return [] if self.strength > 0 else [f"watermark.strength must be positive, not {self.strength:g}."]


@dataclass(frozen=True)
class Detection:
    """What a detector says.

    Attributes:
        z: of standard normal size where there is no mark.
        chance: bound on the probability of such a z without one.
    """

    z: float
    chance: float
    details: dict[str, Any] = field(default_factory=dict)


def read_key(file: str) -> bytes:
    """The secret in a file.

    Raises:
        UserError: there is none, or too short a one.
    """
    try:
        secret = Path(file).read_bytes()
    except OSError as error:
        raise UserError(
            f"The key '{file}' cannot be read ({error.strerror}); make one with 'head -c 32 /dev/urandom > {file}'."
        ) from error
    if len(secret) < KEY_BYTES:
        raise UserError(f"The key '{file}' has {len(secret)} bytes; it needs at least {KEY_BYTES}.")
    return secret


def key_name(secret: bytes) -> str:
    """Names a key without telling it."""
    return hashlib.sha256(b"rayproj watermark " + secret).hexdigest()[:16]


@lru_cache(maxsize=8)
def _band(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the band's coefficients are, int [k] of the flat image, and the ring of each."""
    frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None] / width).ravel()
    places = np.flatnonzero((frequency >= LOW) & (frequency < HIGH))
    rings = ((frequency[places] - LOW) / (HIGH - LOW) * RINGS).astype(int)
    return places, rings


@lru_cache(maxsize=8)
def _signs(secret: bytes, height: int, width: int) -> np.ndarray:
    """±1 [k]."""
    seed = hashlib.sha256(secret + f"/{height}x{width}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(seed[:16], np.uint64)))
    return rng.integers(0, 2, len(_band(height, width)[0])) * 2.0 - 1


def pattern(secret: bytes, height: int, width: int) -> np.ndarray:
    """float64 [height, width] of root mean square 1: what is added to the luminance, times the strength."""
    flat = np.zeros(height * width)
    flat[_band(height, width)[0]] = _signs(secret, height, width)
    found = scipy.fft.idctn(flat.reshape(height, width), norm="ortho")
    return found / np.sqrt(np.square(found).mean())


def mark(images: np.ndarray, secret: bytes, strength: float) -> np.ndarray:
    """uint8 images [n, C, H, W] with the mark."""
    change = strength * pattern(secret, *images.shape[2:])
    return (images + change).round().clip(0, 255).astype(np.uint8)


def evidence(images: np.ndarray) -> np.ndarray:
    """float64 [n, k]: a_k of uint8 images [n, C, H, W]."""
    height, width = images.shape[2:]
    places, rings = _band(height, width)
    a = scipy.fft.dctn(luminance(images), axes=(1, 2), norm="ortho").reshape(len(images), -1)[:, places]
    energy = np.stack([np.square(a[:, rings == r]).sum(1) for r in range(RINGS)], 1)
    square = energy / np.maximum(np.bincount(rings, minlength=RINGS), 1)
    return a / np.maximum(square[:, rings], 1e-9)


def detect(images: np.ndarray, secret: bytes, shape: tuple[int, int] | None = None) -> Detection:
    """Whether these images together are marked.

    Args:
        images: uint8 [n, C, H, W].
        shape: height and width when they were marked, to which they are resized; None: as they are.
    """
    images = images if shape is None or images.shape[2:] == shape else resized(images, shape)
    return _judged(evidence(images).sum(0), _signs(secret, *images.shape[2:]))


def _judged(a: np.ndarray, signs: np.ndarray, tries: int = 1) -> Detection:
    norm = np.sqrt(np.square(a).sum())
    z = float(signs @ a / norm) if norm > 0 else 0.0
    return Detection(z, min(1.0, tries * math.exp(-0.5 * max(z, 0.0) ** 2)))


def detect_crop(image: np.ndarray, secret: bytes, shape: tuple[int, int]) -> Detection:
    """Whether an image is a cut-out, not resized, of a marked one of this shape: at any place where it may have been.

    The chance is that of the best place, times the number of places.
    """
    height, width = image.shape[1:]
    rows, columns = shape[0] - height + 1, shape[1] - width + 1
    if rows < 1 or columns < 1:
        raise UserError(f"An image of {height}x{width} is no cut-out of one of {shape[0]}x{shape[1]}.")
    # Whitened within the cut-out; put at a place of an empty image, it has coefficients b_k of the band, and as above
    # Σ s_k b_k / √(Σ b_k²) is the z of that place. The numerators of all places are a correlation with the pattern.
    places, rings = _band(height, width)
    own = scipy.fft.dctn(luminance(image[None])[0], norm="ortho").ravel()[places]
    energy = np.bincount(rings, np.square(own), RINGS) / np.maximum(np.bincount(rings, minlength=RINGS), 1)
    flat = np.zeros(height * width)
    flat[places] = own / np.maximum(energy[rings], 1e-9)
    white = scipy.fft.idctn(flat.reshape(height, width), norm="ortho")
    numerators = scipy.signal.fftconvolve(pattern(secret, *shape), white[::-1, ::-1], mode="valid")
    found = Detection(-math.inf, 1.0)
    for place in np.argsort(-numerators, axis=None)[:CANDIDATES]:
        top, left = divmod(int(place), columns)
        canvas = np.zeros(shape)
        canvas[top : top + height, left : left + width] = white
        b = scipy.fft.dctn(canvas, norm="ortho").ravel()[_band(*shape)[0]]
        here = _judged(b, _signs(secret, *shape), rows * columns)
        if here.z > found.z:
            found = replace(here, details={"top": top, "left": left})
    return found


def resized(images: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [n, C, *shape], bicubic."""
    return np.stack([of_picture(to_picture(x).resize(shape[::-1], Image.Resampling.BICUBIC)) for x in images])


def as_jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """uint8 images [n, C, H, W] after JPEG."""
    found = []
    for image in images:
        buffer = BytesIO()
        to_picture(image).save(buffer, "jpeg", quality=quality)
        found.append(decode_image(buffer.getvalue()))
    return np.stack(found)


def _cut(images: np.ndarray, share: float) -> np.ndarray:
    height, width = (max(1, round(side * share)) for side in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


ATTACKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda images: images,
    "JPEG 90": lambda images: as_jpeg(images, 90),
    "JPEG 70": lambda images: as_jpeg(images, 70),
    "JPEG 50": lambda images: as_jpeg(images, 50),
    "resized to 3/4": lambda images: resized(images, (images.shape[2] * 3 // 4, images.shape[3] * 3 // 4)),
    "resized to 1/2": lambda images: resized(images, (images.shape[2] // 2, images.shape[3] // 2)),
    "cut to 3/4": lambda images: _cut(images, 0.75),
}


def survival(images: np.ndarray, secret: bytes, chance: float = CHANCE) -> dict[str, dict[str, Any]]:
    """What is left of the mark of uint8 images [n, C, H, W] after each of the attacks.

    Returns:
        By attack: the share of images that are found by themselves where at most `chance` of others would be, and z and
        chance of all of them together; cut-outs are looked for one by one, so that together they have the best of theirs.
        "scores" has the z of each.
    """
    shape, found = (images.shape[2], images.shape[3]), {}
    for name, attack in ATTACKS.items():
        changed = attack(images)
        if name.startswith("cut"):
            alone = [detect_crop(image, secret, shape) for image in changed]
            z = max(one.z for one in alone)
            together = min(1.0, min(one.chance for one in alone) * len(alone))
        else:
            alone = [detect(image[None], secret, shape) for image in changed]
            whole = detect(changed, secret, shape)
            z, together = whole.z, whole.chance
        scores = [round(one.z, 4) for one in alone]
        share = float(np.mean([one.chance <= chance for one in alone]))
        found[name] = {"found": share, "z": z, "chance": together, "scores": scores}
    return found


def survivals(sets: dict[str, str], real: str, secret: bytes, most: int = MARKED) -> dict[str, Any]:
    """What each set that bears the mark of this key has left of it after each attack, beside real images.

    Args:
        sets: name -> dataset; those without the mark are left out.
        real: dataset of unmarked images: how often they seem to have it.

    Returns:
        "sets": as of `survival`, with the area under the curve of true over false positives, against real images after
        the same attack: the chance that a marked image has a larger z than an unmarked one.
    """
    found = {REAL: survival(_some(Dataset.open(real), most), secret)}
    for name, dataset in {name: Dataset.open(uri) for name, uri in sets.items()}.items():
        if dataset.header.provenance.get("watermark", {}).get("key") == key_name(secret):
            found[name] = survival(_some(dataset, most), secret)
            for attack, one in found[name].items():
                one["area"] = area(one["scores"], found[REAL][attack]["scores"])
    images = max(len(one["scores"]) for of in found.values() for one in of.values())
    return {"images": images, "chance": CHANCE, "sets": found}


def area(marked: list[float], unmarked: list[float]) -> float:
    """Under the receiver operating characteristic: Mann and Whitney's U over the number of pairs."""
    return float(scipy.stats.mannwhitneyu(marked, unmarked).statistic / (len(marked) * len(unmarked)))


def _some(dataset: Dataset, most: int) -> np.ndarray:
    return Reader(dataset, ["image"]).gather(np.arange(min(most, dataset.header.num_samples)))["image"]
