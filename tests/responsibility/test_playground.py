"""What may be asked of the playground."""

from typing import Any

import pytest

from rayproj.diffusion.sampling import SamplerConfig
from rayproj.responsibility.playground import Asked, Offer, PlaygroundConfig, Refused, parse

CONFIG = PlaygroundConfig(model="run", sampler=SamplerConfig(steps=8, guidance=2.0), max_images=3, max_characters=20)
OFFER = Offer({"label": ["cat", "dog"], "style": ["flat", "bold"]}, True)


def test_a_request_is_images_with_seeds_in_a_row() -> None:
    assert parse({}, CONFIG, OFFER) == [Asked("", (), 0, 2.0, 8)]
    body = {
        "prompt": " a  red\ncat ",
        "label": "dog",
        "properties": {"style": "flat"},
        "seed": 7,
        "steps": 3,
        "images": 2,
    }
    values = (("label", 1), ("style", 0))
    assert parse(body, CONFIG, OFFER) == [Asked("a red cat", values, seed, 2.0, 3) for seed in (7, 8)]


@pytest.mark.parametrize(
    ("body", "where", "says"),
    [
        ([], "", "is to be a JSON object"),
        ({"promt": "x"}, "promt", "There is no 'promt'; a request has prompt"),
        ({"prompt": 3}, "prompt", "must be a text"),
        ({"prompt": "x" * 21}, "prompt", "has 21 characters; shorten it to 20"),
        ({"seed": -1}, "seed", "a whole number from 0 to"),
        ({"seed": 2**31}, "seed", "a whole number from 0 to"),
        ({"seed": 1.5}, "seed", "a whole number"),
        ({"seed": True}, "seed", "a whole number"),
        ({"seed": "1"}, "seed", 'not "1"'),
        ({"guidance": float("nan")}, "guidance", "a number from 0 to 15"),
        ({"guidance": float("inf")}, "guidance", "a number from 0 to 15"),
        ({"steps": 0}, "steps", "from 1 to 50"),
        ({"images": 4}, "images", "from 1 to 3"),
        ({"label": "cow"}, "label", "choose one of cat, dog"),
        ({"properties": {"hue": "red"}}, "hue", "has no 'hue'; it has label, style"),
        ({"properties": {"style": ["flat"]}}, "style", "choose one of flat, bold"),
        ({"properties": 3}, "properties", "must be an object"),
        ({"prompt": "c\bat"}, "prompt", "control characters or such for private use; send it without them"),
        ({"prompt": "c\0at"}, "prompt", "control characters"),
        ({"prompt": "c\ue000at"}, "prompt", "private use"),
        ({"prompt": "cat \ud800"}, "prompt", "holds half a character .*; send whole ones"),
        ({"\ud800": "cat"}, "", "half a character"),
        ({"properties": {"\udc00": "flat"}}, "properties", "half a character"),
    ],
)
def test_what_is_wrong_is_said(body: Any, where: str, says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        parse(body, CONFIG, OFFER)
    assert refused.value.status == 400 and refused.value.where == where


def test_a_model_without_text_takes_no_prompt() -> None:
    with pytest.raises(Refused, match="takes no prompt; choose by label"):
        parse({"prompt": "x"}, CONFIG, Offer({"label": ["cat"]}, False))


def test_a_config_that_could_serve_nobody_is_refused() -> None:
    wrong = PlaygroundConfig(
        model="run", queue=2, max_images=4, max_steps=4, sampler=SamplerConfig(weights={"text": 2.0})
    )
    said = " ".join(wrong.problems())
    assert "must not exceed playground.queue" in said and "one guidance" in said and "more steps" in said
