"""The score of noised images, learned by denoising (Vincent 2011, "A connection between score matching and denoising
autoencoders"), for a purifier that climbs it.

Our diffusion models know the velocity of latents; what a purifier of images climbs is the score of images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScoreNetwork(nn.Module):
    """s(x) = r(x)/level², with a small U-Net r that is to be minus the noise in x, however much there is.

    Args:
        level: standard deviation of the noise at which s is the score.
    """

    def __init__(self, channels: int, level: float, width: int = 8) -> None:
        super().__init__()
        self.level = level
        self.fine, self.out = nn.Conv2d(channels, width, 3, 1, 1), nn.Conv2d(width, channels, 3, 1, 1)
        self.to_middle, self.middle = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.to_coarse, self.coarse = nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.Conv2d(4 * width, 4 * width, 3, 1, 1)
        self.from_coarse, self.joined = nn.Conv2d(4 * width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.from_middle = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Of images [B, C, H, W] of any size, [B, C, H, W]."""
        fine = F.silu(self.fine(x))
        middle = F.silu(self.middle(F.silu(self.to_middle(fine))))
        coarse = F.silu(self.coarse(F.silu(self.to_coarse(middle))))
        middle = F.silu(self.joined(middle + F.interpolate(self.from_coarse(coarse), size=middle.shape[2:])))
        fine = F.silu(fine + F.interpolate(self.from_middle(middle), size=fine.shape[2:]))
        return self.out(fine) / self.level**2  # type: ignore[no-any-return]


def trained_score(
    clean: Tensor, steps: int = 300, least: float = 0.05, most: float = 0.5, level: float = 0.25, seed: int = 0
) -> ScoreNetwork:
    """Denoising score matching over scales of the noise: min E ‖level² s(x + σε) + σε‖² with log σ even from `least` to
    `most`, the loss of Song and Ermon 2019 (eq. 6) with s(x, σ) = r(x)/σ² and weights σ⁴. At a single scale, which is the
    level, it is ∇ log of the density of the noised images.

    Args:
        clean: fp32 [n, C, H, W] in [0, 1].
    """
    torch.manual_seed(seed)
    found = ScoreNetwork(clean.shape[1], level).to(clean.device)
    optimiser = torch.optim.Adam(found.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            x = clean[torch.randint(len(clean), (64,), generator=generator)]
            even = torch.rand(len(x), 1, 1, 1, generator=generator)
            scale = torch.exp(math.log(least) + (math.log(most) - math.log(least)) * even)
            noise = (scale * torch.randn(x.shape, generator=generator)).to(x)
            loss = (level**2 * found(x + noise) + noise).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return found.eval().requires_grad_(False)
