"""Denoisers: networks that see a noisy latent, a time and a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class DenoiserConfig:
    """A diffusers `UNet2DModel` conditioned on a class label."""

    channels: tuple[int, ...] = (32, 64)  # per level; every level but the last halves height and width
    layers_per_block: int = 1
    attention_from: int = 1  # levels from this one on have self-attention
    head_dim: int = 32
    norm_groups: int = 16

    def problems(self) -> list[str]:
        return [
            f"denoiser.channels: {c} is not a multiple of denoiser.{name}={size}."
            for name, size in (("norm_groups", self.norm_groups), ("head_dim", self.head_dim))
            for c in self.channels
            if c % size
        ]


class Denoiser(nn.Module):
    """Predicts what its process asks for at (x, t) given a label; label `num_classes` means "none"."""

    def __init__(self, config: DenoiserConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.num_classes = num_classes
        attends = [level >= config.attention_from for level in range(len(config.channels))]
        self.unet = UNet2DModel(
            sample_size=latent_shape[-1],
            in_channels=latent_shape[0],
            out_channels=latent_shape[0],
            block_out_channels=tuple(config.channels),
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=config.head_dim,
            norm_num_groups=config.norm_groups,
            num_class_embeds=num_classes + 1,
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The prediction [B, C, h, w] at latents x [B, C, h, w] and times t [B] in [0, 1] (1 is pure noise)."""
        dtype = next(self.parameters()).dtype
        # The network's time embedding is made for 1000 steps.
        out: Tensor = self.unet(x.to(dtype), (t * 1000).to(dtype), class_labels=label).sample
        return out.float() if out.dtype is torch.bfloat16 else out
