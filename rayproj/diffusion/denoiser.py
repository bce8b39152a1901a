"""Denoisers: networks of diffusers that see a noisy latent, a time and a condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayproj.config import below
from rayproj.diffusion import others
from rayproj.diffusion.conditions import LABEL, LOW, Condition, Conditions, Embedding
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.errors import UserError


class Network(Enum):
    unet = "unet"  # `UNet2DModel`; `UNet2DConditionModel`, with attention to the tokens, where there is text
    dit = "dit"  # `DiTTransformer2DModel` (Peebles and Xie 2023): of a class and nothing else
    mmdit = "mmdit"  # `SD3Transformer2DModel` (Esser et al. 2024): text and image in one stream


@dataclass
class DenoiserConfig:
    """Which network of diffusers, and how large."""

    network: Network = Network.unet
    # A folder of diffusers with a `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel`, such as the unet of a
    # Stable Diffusion pipeline: the network, its size and the weights to start from, in place of all else here.
    weights: str = ""
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
    # Whether activations are computed again in the backward instead of being kept: less memory, about a third more time.
    recompute: bool = False
    channels_last: bool = (
        False  # whether a U-Net's images lie pixel by pixel in memory, as convolutions of GPUs like them
    )

    def problems(self) -> list[str]:
        names = ("layers", "heads", "patch", "head_dim", "layers_per_block", "norm_groups")
        if (small := below(1, "denoiser", self, *names)) or self.network is not Network.unet:
            return small
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
        self.conditions, self.kind, self.channels_last = conditions, config.network, config.channels_last
        if config.weights:
            self.net, self.kind = _of_others(config.weights, latent_shape, conditions)
            width = 0
        elif config.network is Network.unet:
            width = 4 * config.channels[0]  # of diffusers' time embedding
            self.net = _unet(config, latent_shape, conditions)
        else:
            width = config.heads * config.head_dim
            if conditions.low:
                raise UserError(f"denoiser.network={config.network.value} has no condition 'low'; choose unet.")
            if latent_shape[-1] != latent_shape[-2] or latent_shape[-1] % config.patch:
                raise UserError(
                    f"Latents of {latent_shape[-2]}x{latent_shape[-1]} do not cut into patches of {config.patch}x"
                    f"{config.patch}; a transformer takes squares, of sides that are multiples of denoiser.patch."
                )
            self.net = (_dit if config.network is Network.dit else _mmdit)(config, latent_shape, conditions)
        if config.recompute:
            self.net.enable_gradient_checkpointing()
        # A DiT has tables of its own, one in each block; so have networks of others.
        self.makes_own_vector = LABEL in conditions.values and (self.kind is Network.dit or not width)
        self.embedding = Embedding(Conditions({}) if self.makes_own_vector else conditions, width)
        self.kept: tuple[str, ...] = ()  # names of parameters that no training changes
        encoder = Path(config.weights).parent / "text_encoder"
        if config.weights and conditions.text and encoder.exists() and not others.planned():
            # With it, whoever trained these weights left texts out.
            text = TextEncoder(TextConfig(str(encoder), conditions.text[0], padding=True), "cpu")
            self.embedding.no_text.weight.data.copy_(text.embed([""]).flatten()[None])
            self.kept = ("embedding.no_text.weight",)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction [B, C, h, w] at latents x [B, C, h, w] and times t [B] in [0, 1] (1 is pure noise)."""
        dtype = next(self.parameters()).dtype
        channels, x = x.shape[1], x.to(dtype)
        steps = (t * 1000).to(dtype)  # the networks' time embeddings are made for 1000 steps
        vector, tokens, there = self.embedding(condition)
        if self.conditions.low:
            x = torch.cat([x, _at(condition[LOW].to(dtype), x.shape[-1])], dim=1)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        if self.makes_own_vector:
            number, none = condition[LABEL], self.conditions.values[LABEL]
            out = self.net(x, steps, class_labels=torch.where(number < 0, none, number)).sample
        elif self.kind is Network.mmdit:
            tokens = vector[:, None] if tokens is None else tokens
            out = self.net(x, tokens, vector, steps).sample
        elif tokens is None:
            out = self.net(x, steps, class_labels=vector).sample
        else:
            out = self.net(x, steps, tokens, class_labels=vector, encoder_attention_mask=there).sample
        out = out[:, :channels]  # some networks predict variances too
        return out.float() if out.dtype is torch.bfloat16 else out


def pixels_together(denoiser: Denoiser, *others: nn.Module) -> None:
    """Lay weights and images out pixel by pixel (channels-last), which is how a GPU's convolutions like them."""
    for model in (denoiser, *others):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser.channels_last = True


@contextmanager
def remembering(model: Denoiser) -> Iterator[None]:
    """A block in which what depends on the condition alone is computed once, as long as it is the same object: its
    embedding, and the keys and values that the image attends to. For samplers, which ask the same of every step."""
    layers: list[Any] = [model.embedding]
    compiled = model.net._compiled_call_impl is not None  # in which nothing of Python is remembered
    for module in () if compiled else model.net.modules():
        if getattr(module, "is_cross_attention", False):
            layers += [module.to_k, module.to_v]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _last(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _last(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, which is not run again on the argument that it was last given."""
    known: list[tuple[Any, Any]] = []

    def remembered(argument: Any) -> Any:
        if not known or known[0][0] is not argument:
            known[:] = [(argument, function(argument))]
        return known[0][1]

    return remembered


def _of_others(folder: str, shape: tuple[int, ...], conditions: Conditions) -> tuple[Any, Network]:
    """The network in a folder of diffusers.

    Raises:
        UserError: there is none, or it was made for other latents or conditions.
    """
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    known = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)}
    said = others.config_of(folder, "denoiser.weights")
    if (name := said.get("_class_name")) not in known:
        raise UserError(
            f"denoiser.weights='{folder}' is a {name}; the networks that can be taken are {', '.join(known)}."
        )
    net = others.load(known[name], folder, "denoiser.weights")
    values, wanted = dict(conditions.values), {"label": 0}
    if name == "UNet2DConditionModel":
        fits = not values and conditions.text[1:] == (net.config.cross_attention_dim,)
        wanted = {"text of dimension": net.config.cross_attention_dim}
    else:
        own = (
            net.config.num_embeds_ada_norm
            if name == "DiTTransformer2DModel"
            else (net.config.num_class_embeds or 0) - 1
        )
        fits = not conditions.text and values == ({LABEL: own} if own >= 0 else {})
        wanted = {"classes": max(own, 0)}
    if not fits or net.config.in_channels != shape[0] or conditions.low:
        raise UserError(
            f"denoiser.weights='{folder}' is for latents of {net.config.in_channels} channels and {wanted}, and these "
            f"latents have {shape[0]} channels and {values or {'text': conditions.text}}; set diffusion.conditions so that "
            "they fit."
        )
    return _undropped(net), Network.dit if name == "DiTTransformer2DModel" else Network.unet


def _undropped(net: Any) -> Any:
    """Without dropout of labels by the network, which are dropped by the rows' keys."""
    for module in net.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return net


def _at(low: Tensor, side: int) -> Tensor:
    """An image at the side of the latents: what it has more of pixels becomes channels, what it has less is repeated."""
    if low.shape[-1] > side:
        return nn.functional.pixel_unshuffle(low, low.shape[-1] // side)
    return nn.functional.interpolate(low, size=(side, side), mode="nearest")


def _channels_of(low: tuple[int, ...], side: int) -> int:
    """Of `_at`."""
    if not low:
        return 0
    large, small = max(low[-1], side), min(low[-1], side)
    if low[-1] != low[-2] or large % small:
        raise UserError(
            f"A low image of {low[-2]}x{low[-1]} does not go with latents of side {side}: one must divide the other."
        )
    return low[0] * max(1, low[-1] // side) ** 2


def _unet(config: DenoiserConfig, shape: tuple[int, ...], conditions: Conditions) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    attends = [level >= config.attention_from for level in range(len(config.channels))]
    kind = "CrossAttn" if conditions.text else "Attn"
    common: dict[str, Any] = {
        "sample_size": shape[-1],
        "in_channels": shape[0] + _channels_of(conditions.low, shape[-1]),
        "out_channels": shape[0],
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": tuple(f"{kind}DownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple(f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "norm_num_groups": config.norm_groups,
        "class_embed_type": "identity" if conditions.values or conditions.text or conditions.low else None,
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
    return _undropped(
        DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=shape[0],
            out_channels=shape[0],
            num_layers=config.layers,
            sample_size=shape[-1],
            patch_size=config.patch,
            num_embeds_ada_norm=conditions.values[LABEL],
        )
    )


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
