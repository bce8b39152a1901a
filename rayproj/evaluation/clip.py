"""How well images go with their texts, by a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj.evaluation.folders import loading

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training


class ClipScore:
    """100 max(0, cos) of the embeddings of an image and its text (Hessel et al. 2021, "CLIPScore", eq. 1, with the
    factor that is usual since).

    Args:
        folder: a `CLIPModel` of transformers with its tokenizer, such as openai/clip-vit-large-patch14-336.

    Raises:
        UserError: there is none.
    """

    def __init__(self, folder: str, device: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.device, self.name = device, folder
        wanted = "a CLIPModel of transformers and its tokenizer. None comes with this package"
        with loading(f"evaluate.clip='{folder}'", wanted):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        self.model = model.to(device).eval().requires_grad_(False)
        sizes: Any = self.model.config
        self.side = int(sizes.vision_config.image_size)
        self.words = int(sizes.text_config.max_position_embeddings)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to the network's input: RGB, antialiased bicubic, normalised as it was trained."""
        x = images.to(self.device).float()
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return (x.round().clamp(0, 255) / 255 - mean) / std

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """fp32 [B], from 0 to 100, of uint8 images [B, C, H, W]."""
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.words, return_tensors="pt"
        ).to(self.device)
        found = self.model(
            pixel_values=self.prepare(images), input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        )
        return 100 * F.cosine_similarity(found.image_embeds.float(), found.text_embeds.float()).clamp(min=0)
