"""Our kernels in the networks of diffusers: where a GPU is faster with them (`rayproj.kernels.admission`), norms take the
operations around them along. Parameters and their names stay as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rayproj.kernels import admission  # type: ignore[attr-defined]


class GroupNormSilu(nn.GroupNorm):
    """GroupNorm with the SiLU that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        if admission.admits("group norm + SiLU", x):
            from rayproj.kernels.norms_triton import group_norm_silu  # type: ignore[attr-defined]

            found: Tensor = group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)
            return found
        return F.silu(super().forward(x))


class SiluLinear(nn.Linear):
    """Linear with the SiLU before it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.silu(x))


class NormZero(AdaLayerNormZero):
    """The adaptive norm that begins a DiT's block."""

    def forward(  # type: ignore[no-untyped-def,override]
        self, x: Tensor, timestep=None, class_labels=None, hidden_dtype=None, emb=None
    ) -> tuple[Tensor, ...]:
        if not admission.admits("layer norm + modulate", x):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        from rayproj.kernels.norms_triton import layer_norm_modulate  # type: ignore[attr-defined]

        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return layer_norm_modulate(x, shift, scale, self.norm.eps), *rest


class Block(BasicTransformerBlock):
    """A DiT's block: attention, gate, residual and norm, and the MLP (Peebles and Xie 2023, figure 3)."""

    def forward(  # type: ignore[no-untyped-def,override]
        self, x: Tensor, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
        cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
    ) -> Tensor:  # fmt: skip
        if not admission.admits("gate + residual + layer norm + modulate", x):
            return super().forward(x, timestep=timestep, class_labels=class_labels)
        from rayproj.kernels.norms_triton import gated_norm_modulate  # type: ignore[attr-defined]

        y, gate, shift, scale, gate_mlp = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        x, y = gated_norm_modulate(x, self.attn1(y), gate, shift, scale, self.norm3.eps)
        return torch.addcmul(x, gate_mlp[:, None], self.ff(y))


def fuse(*models: nn.Module) -> None:
    """Make the layers of diffusers in these models those above, in place."""
    for model in models:
        for module in list(model.modules()):
            if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, nn.SiLU):
                _fuse_resnet(module)
            elif isinstance(getattr(module, "conv_norm_out", None), nn.GroupNorm) and isinstance(
                module.conv_act, nn.SiLU
            ):
                module.conv_norm_out.__class__, module.conv_act = GroupNormSilu, nn.Identity()
            elif isinstance(module, BasicTransformerBlock) and module.norm_type == "ada_norm_zero":
                module.__class__, module.norm1.__class__ = Block, NormZero


def _fuse_resnet(block: ResnetBlock2D) -> None:
    if block.time_embedding_norm != "default" or block.skip_time_act:
        return
    block.norm1.__class__ = block.norm2.__class__ = GroupNormSilu
    if block.time_emb_proj is not None:
        block.time_emb_proj.__class__ = SiluLinear
    block.nonlinearity = nn.Identity()
