"""A small network that repaints an image in one of several styles, and how it is trained here.

The network is the feed-forward one of Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer", with a scale
and shift of its own for each style (Dumoulin et al. 2017, "A Learned Representation for Artistic Style"). A style is known
by the Gram matrices of random filters of several sizes, which are enough for textures (Ustyuzhaninov et al. 2017, "What does
it take to generate natural textures?"); so the training needs no weights of others. The content is what is left of the
luminance at a quarter of the resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed
from rayproj.obfuscation.pixels import grey

FILTERS, SIZES = 48, (3, 7, 13)  # random filters of each size, in pixels


class StyleNorm(nn.Module):
    """Instance normalisation with a scale and shift for each style."""

    def __init__(self, channels: int, styles: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(styles, channels))
        self.shift = nn.Parameter(torch.zeros(styles, channels))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.instance_norm(x)
        return x * self.scale[style][:, :, None, None] + self.shift[style][:, :, None, None]


class StyleNetwork(nn.Module):
    """Images [B, 3, H, W] in [0, 255] to the same, each in the style of its number.

    Args:
        pictures: how many styles are of pictures; they come first.
        textures: how many are of textures.
    """

    def __init__(self, pictures: int, textures: int, width: int = 16) -> None:
        super().__init__()
        self.pictures, self.textures, self.width = pictures, textures, width
        sizes = [(3, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2), (2 * width, 2 * width, 1)]
        sizes += [(2 * width, 2 * width, 1), (2 * width, width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride, 1, padding_mode="reflect") for i, o, stride in sizes)
        self.norms = nn.ModuleList(StyleNorm(o, pictures + textures) for _, o, _ in sizes)
        self.last = nn.Conv2d(width, 3, 5, padding=2, padding_mode="reflect")

    def forward(self, images: Tensor, style: Tensor) -> Tensor:
        x, size = images / 127.5 - 1, images.shape[2:]
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if number == 4:
                x = F.interpolate(x, size=[-(-n // 2) for n in size], mode="nearest")
            elif number == 5:
                x = F.interpolate(x, size=size, mode="nearest")
            x = F.relu(norm(conv(x), style))
        return 127.5 * (1 + torch.tanh(self.last(x)))

    def save(self) -> bytes:
        from safetensors.torch import save

        sizes = {name: str(getattr(self, name)) for name in ("pictures", "textures", "width")}
        return save(self.state_dict(), metadata=sizes)

    @classmethod
    def load(cls, data: bytes) -> StyleNetwork:
        """Of what `save` gave, in eval mode."""
        import json
        import struct

        from safetensors.torch import load

        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
        network = cls(int(header["pictures"]), int(header["textures"]), int(header["width"]))
        network.load_state_dict(load(data))
        return network.eval().requires_grad_(False)


class RandomFilters(nn.Module):
    """Gram matrices [B, FILTERS, FILTERS] of the rectified responses to random filters, for each of the sizes."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.zeros(1, 3, dtype=torch.int64)
        for size in SIZES:
            w = keyed.normal(0, f"style filters {size}", row, (FILTERS, 3, size, size))[0]
            w = w - w.mean((2, 3), keepdim=True) * (torch.arange(FILTERS) % 4 != 0)[:, None, None, None]
            self.register_buffer(f"w{size}", w / w.flatten(1).norm(dim=1)[:, None, None, None])

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for size in SIZES:
            r = F.relu(F.conv2d(x, getattr(self, f"w{size}"), padding=size // 2, stride=1 + size // 6)).flatten(2)
            found.append(r @ r.mT / r.shape[2])
        return found


def content(x: Tensor) -> Tensor:
    """Luminance at a quarter of the resolution, each image with mean 0 and deviation 1."""
    y = F.avg_pool2d(grey(x), max(1, min(4, x.shape[2] // 8)))
    return (y - y.mean((2, 3), keepdim=True)) / (y.std((2, 3), keepdim=True) + 1e-3)


def train_styles(
    pictures: Tensor,
    textures: Tensor,
    images: Tensor,
    steps: int,
    batch: int,
    seed: int,
    weight: float = 1.0,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> StyleNetwork:
    """Train a network on images, each under a style that is drawn for it.

    Args:
        pictures, textures: uint8 [n, 3, h, w], the styles.
        images: uint8 [n, C, H, W], what is repainted.
        weight: of the content against the style.
        told: called with the step and the loss.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    device, size = images.device, images.shape[2:]
    network = StyleNetwork(len(pictures), len(textures)).to(device)
    filters = RandomFilters().to(device)
    examples = [
        F.interpolate(p.to(device).float(), size=size, mode="bilinear", antialias=True) for p in (pictures, textures)
    ]
    with torch.no_grad():
        wanted = filters(torch.cat(examples) / 127.5 - 1)
    scale = [w.flatten(1).norm(dim=1) for w in wanted]
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        row = torch.tensor([[k, step, 0] for k in range(batch)])
        u = keyed.uniform(seed, "styles", row, (2,)).to(device)
        x = images[(u[:, 0] * len(images)).long()].float().expand(-1, 3, -1, -1)
        style = (u[:, 1] * (len(pictures) + len(textures))).long()
        made = network(x, style)
        found = filters(made / 127.5 - 1)
        differences = [
            (g - w[style]).flatten(1).norm(dim=1) / s[style] for g, w, s in zip(found, wanted, scale, strict=True)
        ]
        kept = (content(made) - content(x)).square().mean((1, 2, 3))
        loss = (torch.stack(differences).mean(0) + weight * kept).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        told(step + 1, float(loss.detach()))
    return network.eval().requires_grad_(False)
