"""What obfuscations lay over images or put them into: other pictures, icons, texts, noise, and what was learned.

Pictures come from a dataset; where none is given there is a bank of procedural scenes. Icons and texts are glyphs of the
DejaVu fonts that matplotlib brings. Adversarial patches and the network of styles are learned, by
`jobs/learn_obfuscations.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rayproj import keyed
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.obfuscation import scenes
from rayproj.storage.store import Store

if TYPE_CHECKING:
    from rayproj.obfuscation.styles import StyleNetwork

ICONS = "★☀☁☂☎☕☠☢☮☯☺♛♞♥♫♻⚓⚔⚙⚡✂✈✉✿❄"
TEXTS = ("SAMPLE", "PREVIEW", "do not copy", "hello world", "SOLD OUT", "breaking news", "lorem ipsum", "COPYRIGHT")
GLYPH, LINE = 64, 48  # pixels of an icon's side and of the height of a line of text
TILE = 512  # side of the noise
SCENES = 64  # that there are where no dataset is given
PATCHES, STYLES = "patches.safetensors", "styles.safetensors"


@dataclass
class AssetsConfig:
    """Where the pictures and what was learned come from."""

    photos: str = ""  # a dataset, of which the first are used; "": procedural scenes
    count: int = 64  # of its images
    learned: str = ""  # run dir of jobs/learn_obfuscations.py; "": no patches and no styles

    def problems(self) -> list[str]:
        return [] if self.count > 0 else [f"assets.count must be positive, not {self.count}."]


class Assets:
    """All of it, on one device.

    Args:
        photos: uint8 [n, C, h, w].
        patches: uint8 [n, C, s, s], or None.
        styles: of pictures and of textures, or None.
        provenance: how it can be had again.
    """

    def __init__(
        self,
        photos: Tensor,
        patches: Tensor | None = None,
        styles: StyleNetwork | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self._photos, self.patches, self.styles = photos, patches, styles
        self.provenance = provenance or {}
        self._fitted: dict[tuple[int, ...], Tensor] = {}
        self._bound: dict[str, Tensor] = {}

    @classmethod
    def load(cls, config: AssetsConfig, device: str = "cpu") -> Assets:
        """What a config names; what was loaded once in this process is not loaded again.

        Raises:
            UserError: a dataset or run is not there.
        """
        return _load(config.photos, config.count, config.learned, device)

    @property
    def device(self) -> torch.device:
        return self._photos.device

    def has(self, what: str) -> bool:
        """Whether there is what an obfuscation needs: "patches" or "styles"."""
        return not what or getattr(self, what) is not None

    def photos(self, number: Tensor, shape: torch.Size) -> Tensor:
        """uint8 [B, *shape]: the pictures of these numbers, modulo how many there are."""
        key = tuple(shape)
        if key not in self._fitted:
            self._fitted[key] = fitted(self._photos, key)
        bank = self._fitted[key]
        return bank[number % len(bank)]

    def noise(self, number: Tensor, shape: torch.Size) -> Tensor:
        """uint8 [B, *shape]: windows, at a place that the number says, of one tile of even noise, which repeats."""
        channels, height, width = shape
        tile = self._kept("noise", _noise)[:channels]
        tile = tile.repeat(1, 1 + -(-height // TILE), 1 + -(-width // TILE))
        corners = [(n % TILE, n // TILE % TILE) for n in number.tolist()]
        return torch.stack([tile[:, y : y + height, x : x + width] for y, x in corners])

    def icons(self, number: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """fp32 [B, 1, H, W] in [0, 1]: an icon at places [B, H] and [B, W] in [0, 1) of its square."""
        bank = self._kept("icons", _icons)
        rows, columns = ((p * GLYPH).long()[:, None] for p in (v, u))
        found = bank[number % len(bank)][:, None]
        found = found.gather(2, rows[..., None].expand(-1, -1, -1, GLYPH))
        return found.gather(3, columns[:, :, None].expand(-1, -1, found.shape[2], -1)).float() / 255

    def texts(self, number: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """fp32 [B, 1, H, W] in [0, 1]: a text at places [B, H, W] in lines, repeated along each and line after line."""
        bank = self._kept("texts", _texts)
        height, width = bank.shape[1:]
        row = (v * height).floor().long() % height
        column = (u * height).floor().long() % width
        place = ((number % len(bank))[:, None, None] * height + row) * width + column
        return bank.flatten()[place][:, None].float() / 255

    def _kept(self, name: str, make: Any) -> Tensor:
        if name not in self._bound:
            self._bound[name] = make().to(self.device)
        return self._bound[name]


def fitted(photos: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint8 [n, *shape] of [n, C, h, w]: scaled to fill the frame and cut at two sides; grey where that is asked for."""
    channels, height, width = shape
    x = photos.float()
    if channels == 1 and x.shape[1] == 3:
        x = torch.einsum("nchw,c->nhw", x, torch.tensor([0.299, 0.587, 0.114], device=x.device))[:, None]
    x = x.expand(-1, channels, -1, -1)
    scale = max(height / x.shape[2], width / x.shape[3])
    size = (max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale)))
    if size != tuple(x.shape[2:]):
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[:, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)


@lru_cache(4)
def _load(photos: str, count: int, learned: str, device: str) -> Assets:
    said: dict[str, Any] = asdict(AssetsConfig(photos, count, learned))
    if photos:
        dataset = Dataset.open(photos)
        first = np.arange(min(count, dataset.header.num_samples))
        bank = torch.from_numpy(Reader(dataset, ["image"]).gather(first)["image"])
    else:
        bank = scenes.pictures(SCENES)
    said["pictures"] = hashlib.sha256(bank.numpy().tobytes()).hexdigest()
    patches, styles = None, None
    if learned:
        from safetensors.torch import load

        from rayproj.obfuscation.styles import StyleNetwork

        store = Store(learned)
        if not store.exists("result.json"):
            raise UserError(
                f"'{learned}' is no finished run of jobs/learn_obfuscations.py; finish it by the same command."
            )
        if store.exists(PATCHES):
            data = store.read(PATCHES)
            patches, said["patches"] = load(data)["patches"].to(device), hashlib.sha256(data).hexdigest()
        if store.exists(STYLES):
            data = store.read(STYLES)
            styles, said["styles"] = StyleNetwork.load(data).to(device), hashlib.sha256(data).hexdigest()
    return Assets(bank.to(device), patches, styles, said)


def _noise() -> Tensor:
    row = torch.tensor([[0, 0, 0]])
    return (256 * keyed.uniform(0, "obfuscation/noise", row, (3, TILE, TILE))[0]).to(torch.uint8)


@lru_cache(8)
def dejavu(size: int) -> ImageFont.FreeTypeFont:
    """The font in so many pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _icons() -> Tensor:
    found = []
    for glyph in ICONS:
        picture = Image.new("L", (GLYPH, GLYPH))
        ImageDraw.Draw(picture).text((GLYPH / 2, GLYPH / 2), glyph, 255, dejavu(round(0.85 * GLYPH)), anchor="mm")
        found.append(np.asarray(picture))
    return torch.from_numpy(np.stack(found))


def _texts() -> Tensor:
    font = dejavu(round(0.75 * LINE))
    width = max(int(font.getlength(text)) for text in TEXTS) + LINE // 2
    found = []
    for text in TEXTS:
        picture = Image.new("L", (width, LINE))
        draw, step = ImageDraw.Draw(picture), font.getlength(text) + LINE / 2
        times = max(1, int(width // step))
        for k in range(times):  # as often as it fits, evenly, so that the line can be repeated
            draw.text((k * width / times, LINE / 2), text, 255, font, anchor="lm")
        found.append(np.asarray(picture))
    return torch.from_numpy(np.stack(found))
