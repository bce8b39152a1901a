"""Denoisers: networks of diffusers that see a noisy latent, a time and a condition."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from rayproj.diffusion.conditions import LABEL, Condition, Conditions, Embedding
from rayproj.errors import UserError


class Network(Enum):
    unet = "unet"  # `UNet2DModel`; `UNet2DConditionModel`, with attention to the tokens, where there is text
    dit = "dit"  # `DiTTransformer2DModel` (Peebles and Xie 2023): of a class and nothing else
    mmdit = "mmdit"  # `SD3Transformer2DModel` (Esser et al. 2024): text and image in one stream


@dataclass
class DenoiserConfig:
    """Which network of diffusers, and how large."""

    network: Network = Network.unet
    head_dim: int = 32
    # Of a U-Net.
    channels: tuple[int, ...] = (32, 64)  # per level; every level but the last halves height and width
    layers_per_block: int = 1
    attention_from: int = 1  # levels from this one on have attention
    norm_groups: int = 16
    # Of a transformer.
    layers: int = 6
    heads: int = 4
    patch: int = 2  # side of a token in latent pixels

    def problems(self) -> list[str]:
        if self.network is not Network.unet:
            names = ("layers", "heads", "patch", "head_dim")
            return [f"denoiser.{name} must be at least 1." for name in names if getattr(self, name) < 1]
        return [
            f"denoiser.channels: {c} is not a multiple of denoiser.{name}={size}."
            for name, size in (("norm_groups", self.norm_groups), ("head_dim", self.head_dim))
            for c in self.channels
            if c % size
        ]


class Denoiser(nn.Module):
    """Predicts what its process asks for at (x, t) under a condition.

    Raises:
        UserError: the network cannot have these conditions, or latents of this shape.
    """

    def __init__(self, config: DenoiserConfig, latent_shape: tuple[int, ...], conditions: Conditions) -> None:
        super().__init__()
        self.conditions, self.kind = conditions, config.network
        if config.network is Network.unet:
            width = 4 * config.channels[0]  # of diffusers' time embedding
            self.net = _unet(config, latent_shape, conditions)
        else:
            width = config.heads * config.head_dim
            if latent_shape[-1] != latent_shape[-2] or latent_shape[-1] % config.patch:
                raise UserError(
                    f"Latents of {latent_shape[-2]}x{latent_shape[-1]} do not cut into patches of {config.patch}x"
                    f"{config.patch}; a transformer takes squares, of sides that are multiples of denoiser.patch."
                )
            self.net = (_dit if config.network is Network.dit else _mmdit)(config, latent_shape, conditions)
        # A DiT has tables of its own, one in each block.
        self.embedding = Embedding(Conditions({}) if config.network is Network.dit else conditions, width)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction [B, C, h, w] at latents x [B, C, h, w] and times t [B] in [0, 1] (1 is pure noise)."""
        dtype = next(self.parameters()).dtype
        x, steps = x.to(dtype), (t * 1000).to(dtype)  # the networks' time embeddings are made for 1000 steps
        vector, tokens, there = self.embedding(condition)
        if self.kind is Network.dit:
            number, none = condition[LABEL], self.conditions.values[LABEL]
            out = self.net(x, steps, class_labels=torch.where(number < 0, none, number)).sample
        elif self.kind is Network.mmdit:
            tokens = vector[:, None] if tokens is None else tokens
            out = self.net(x, tokens, vector, steps).sample
        elif tokens is None:
            out = self.net(x, steps, class_labels=vector).sample
        else:
            out = self.net(x, steps, tokens, class_labels=vector, encoder_attention_mask=there).sample
        return out.float() if out.dtype is torch.bfloat16 else out


def _unet(config: DenoiserConfig, shape: tuple[int, ...], conditions: Conditions) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    attends = [level >= config.attention_from for level in range(len(config.channels))]
    kind = "CrossAttn" if conditions.text else "Attn"
    common: dict[str, Any] = {
        "sample_size": shape[-1],
        "in_channels": shape[0],
        "out_channels": shape[0],
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": tuple(f"{kind}DownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple(f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "norm_num_groups": config.norm_groups,
        "class_embed_type": "identity" if conditions.values or conditions.text else None,
    }
    if not conditions.text:
        return UNet2DModel(**common, attention_head_dim=config.head_dim)
    # Here diffusers takes this name for the number of heads.
    heads = tuple(c // config.head_dim for c in config.channels)
    return UNet2DConditionModel(**common, attention_head_dim=heads, cross_attention_dim=conditions.text[1])


def _dit(config: DenoiserConfig, shape: tuple[int, ...], conditions: Conditions) -> Any:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if conditions.text or set(conditions.values) != {LABEL}:
        raise UserError("denoiser.network=dit has the condition 'label' and no other; choose unet or mmdit.")
    net = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=shape[0],
        out_channels=shape[0],
        num_layers=config.layers,
        sample_size=shape[-1],
        patch_size=config.patch,
        num_embeds_ada_norm=conditions.values[LABEL],
    )
    for module in net.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # of labels, which are dropped by the rows' keys
    return net


def _mmdit(config: DenoiserConfig, shape: tuple[int, ...], conditions: Conditions) -> Any:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    width = config.heads * config.head_dim
    if not (conditions.text or conditions.values):
        raise UserError("denoiser.network=mmdit needs a condition; give diffusion.conditions one, or choose unet.")
    return SD3Transformer2DModel(
        sample_size=shape[-1],
        patch_size=config.patch,
        in_channels=shape[0],
        out_channels=shape[0],
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        joint_attention_dim=conditions.text[1] if conditions.text else width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=shape[-1] // config.patch,
        qk_norm="rms_norm",
    )
