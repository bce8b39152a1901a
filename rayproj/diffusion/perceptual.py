"""What makes an autoencoder's images sharp: a distance in a network's features, and a critic of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

TAPS = (
    0,
    2,
    4,
)  # blocks of EfficientNet-lite0 after which features are compared: a half, a quarter and an eighth of the side


class PerceptualDistance:
    """Squared distance of features, each position scaled to length one (Zhang et al. 2018, "The Unreasonable Effectiveness
    of Deep Features as a Perceptual Metric", eq. 1, unweighted), over EfficientNet-lite0, which ships in a package."""

    def __init__(self) -> None:
        from rayproj.evaluation.features import EfficientNetLite0Features

        self.net: nn.Module = _Stages(EfficientNetLite0Features().model)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[B], of images [B, C, H, W] in [-1, 1]; C is 1 or 3."""
        if next(self.net.parameters()).device != x.device:
            self.net.to(x.device)
        found = torch.zeros(len(x), device=x.device)
        for a, b in zip(self._features(x), self._features(y), strict=True):
            a, b = (nn.functional.normalize(t, dim=1, eps=1e-6) for t in (a, b))
            found = found + (a - b).square().sum(1).flatten(1).mean(1)
        return found

    def _features(self, x: Tensor) -> list[Tensor]:
        x = x.float() * (127.5 / 128)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if isinstance(x, FakeTensor):  # memory is planned with them
            held = [*self.net.named_parameters(), *self.net.named_buffers()]
            state: dict[str, Any] = {name: x.fake_mode.from_tensor(tensor) for name, tensor in held}
            return torch.func.functional_call(self.net, state, (x,))  # type: ignore[no-any-return]
        return self.net(x)  # type: ignore[no-any-return]


class _Stages(nn.Module):
    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(list(whole._blocks)[: TAPS[-1] + 1])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in TAPS:
                found.append(x)
        return found


class PatchCritic(nn.Module):
    """Whether patches of an image are real (Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial
    Networks", section 3.2.2), with GroupNorm, so that examples do not mix."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(2):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B], the mean over the patches."""
        scores: Tensor = self.layers(x)
        return scores.flatten(1).mean(1)

    def losses(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """Of whoever made the images, and of the critic (the hinge of Lim and Ye 2017); each trains its own side alone."""
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        makers = -torch.func.functional_call(self, frozen, (made,))
        critics = torch.relu(1 - self(real)) + torch.relu(1 + self(made.detach()))
        return makers, critics
