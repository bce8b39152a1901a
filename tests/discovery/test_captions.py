"""Features and captions of images, retrieved and written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayproj.data.dataset import Dataset
from rayproj.data.encodings import to_picture
from rayproj.data.reader import Reader
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.discovery.captions import (
    CaptionConfig,
    EmbedderConfig,
    index_header,
    open_captioner,
    open_embedder,
)
from rayproj.errors import UserError
from tests.support import planted

INDEXER = "rayproj.discovery.captions:Indexer"


def test_a_known_image_is_given_its_own_caption_and_one_alike_is_too(tmp_path: Path) -> None:
    found = planted.figures("test", 0)
    known = planted.write(str(tmp_path / "known"), {name: column[:60] for name, column in found.items()}, 16)
    header = index_header(CaptionConfig(), EmbedderConfig(size=32), known, 1280)
    index = Dataset.create(str(tmp_path / "index"), header)
    planted.make(index, INDEXER, {"out": index.uri, "batch": 7})
    embed, caption = open_embedder(EmbedderConfig(size=32), "cpu"), open_captioner(CaptionConfig(), index.uri, "cpu")
    columns = Reader(known, ["image", "caption"]).gather(np.arange(60))
    images = torch.from_numpy(columns["image"])
    assert caption(images, embed(images).numpy()) == list(columns["caption"])
    darker = (images.float() * 0.9).round().to(torch.uint8)
    same = np.mean([a == b for a, b in zip(caption(darker, embed(darker).numpy()), columns["caption"], strict=True)])
    assert same > 0.6
    with pytest.raises(UserError, match=r"has no field 'text'; give discover\.captions\.field"):
        index_header(CaptionConfig(field="text"), EmbedderConfig(), known, 1280)


def write_captioner(folder: Path) -> Any:
    """ViT with a GPT-2 decoder, random, with the tokenizer that ships in a package."""
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    torch.manual_seed(0)
    words = TextEncoder(TextConfig(), "cpu").tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    image = ViTConfig(image_size=24, patch_size=8, initializer_range=1.0, **sizes)
    special = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
    text = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=1.0, **special
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text, decoder_start_token_id=101, **special)
    model = VisionEncoderDecoderModel(config=config).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    return model


def test_a_model_of_transformers_writes_captions(tmp_path: Path) -> None:
    model = write_captioner(tmp_path)
    images = torch.from_numpy(planted.figures("test", 0)["image"][:40:10])
    caption = open_captioner(CaptionConfig(model=str(tmp_path), tokens=6), "", "cpu")
    found = caption(images, np.zeros((4, 1), np.float32))
    assert len(found) == 4 and all(found) and found == caption(images, np.zeros((4, 1), np.float32))
    one_by_one = [caption(image[None], np.zeros((1, 1), np.float32))[0] for image in images]
    assert found == one_by_one, "whatever is beside it"
    from transformers import AutoTokenizer, ViTImageProcessor

    given = ViTImageProcessor.from_pretrained(tmp_path)([to_picture(i.numpy()) for i in images], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=6, do_sample=False)
    direct = AutoTokenizer.from_pretrained(tmp_path).batch_decode(out, skip_special_tokens=True)
    assert found == [text.strip() for text in direct]


def test_an_image_model_of_transformers_embeds(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=24, patch_size=8, **sizes)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    images = torch.from_numpy(planted.figures("test", 0)["image"][:3])
    found = open_embedder(EmbedderConfig(model=str(tmp_path)), "cpu")(images)
    assert found.shape == (3, 16) and found.std() > 0
    assert open_embedder(EmbedderConfig(size=32), "cpu")(images).shape == (3, 1280)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"discover\.embedder\.model=.* cannot be loaded"):
        open_embedder(EmbedderConfig(model=str(tmp_path)), "cpu")
    with pytest.raises(UserError, match=r"discover\.captions\.model=.* cannot be loaded"):
        open_captioner(CaptionConfig(model=str(tmp_path)), "", "cpu")
    assert CaptionConfig(tokens=0).problems()
