"""A small random CLIP, with the tokenizer that ships in a package."""

from __future__ import annotations

from pathlib import Path

import torch

from rayproj.diffusion.text import TextConfig, TextEncoder


def write(folder: Path) -> str:
    """As transformers keeps it: images of 16 by 16, eight tokens."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    words = TextEncoder(TextConfig(), "cpu").tokenizer
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 102},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
