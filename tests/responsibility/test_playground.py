"""What may be asked of the playground."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rayproj.diffusion.sampling import SamplerConfig
from rayproj.judging.records import ServedConfig, served
from rayproj.responsibility import playground
from rayproj.responsibility.playground import Asked, Decisions, Offer, Places, PlaygroundConfig, Refused, parse, read
from rayproj.storage.store import Store, to_json

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
    assert "must not exceed playground.per_address" in " ".join(PlaygroundConfig("run", per_address=3).problems())


@pytest.mark.parametrize("body", [b"[" * 65000, b'{"seed":' * 5000, b"\xff", b"{", b""])
def test_what_is_no_json_is_said(body: bytes) -> None:
    with pytest.raises(Refused, match=r"nested too deeply|is no JSON") as refused:
        read(body)
    assert refused.value.status == 400


def test_whatever_depth_can_be_read_is_answered() -> None:
    """There are depths that can be read but not written again."""
    for depth in range(900, 1000):
        with pytest.raises(Refused) as refused:
            parse(read(b'{"properties": {"style": ' + b"[" * depth + b"]" * depth + b"}}"), CONFIG, OFFER)
        assert refused.value.status == 400


def test_nobody_holds_all_places() -> None:
    places = Places(queue=8, per_address=3)
    places.paced(10.0, 4)
    with ExitStack() as stack:
        for address, images in (("192.0.2.1", 2), ("192.0.2.1", 1), ("2001:db8::1", 3)):
            stack.enter_context(places.taken(images, address))
        for address in ("192.0.2.1", "2001:db8::2"):
            with pytest.raises(Refused, match=r"Too many images of yours are waiting; ask again in 15 s") as refused:
                stack.enter_context(places.taken(1, address))
            assert refused.value.status == 429 and refused.value.more == {"retry_after": 15, "waiting": 6}
        stack.enter_context(places.taken(1, "192.0.2.2"))
        with pytest.raises(Refused, match="Too many images are waiting") as refused:
            stack.enter_context(places.taken(2, "192.0.2.3"))
        assert refused.value.status == 503 and places.waiting == 7
    assert places.waiting == 0
    with places.taken(3, "192.0.2.1"), pytest.raises(ZeroDivisionError), places.taken(5, "127.0.0.1"):
        raise ZeroDivisionError  # of this machine come those of many, by a proxy
    with places.taken(3, "192.0.2.2"), places.taken(3, "192.0.2.1"):
        assert places.waiting == 6, "what was given back can be had again"


def test_who_asks_again_and_again_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground, "PAUSE", 0.05)
    store = Store(str(tmp_path))
    store.write("run.json", to_json({"job": "serve_playground"}))

    def told() -> dict[str, int]:
        found = served(ServedConfig(store.uri))
        assert found is not None
        return {d["rule"]: d["count"] for d in found["decisions"]}

    decisions = Decisions(store, 5)
    for number in range(40):
        rule = ("sexual", "violence")[number % 4 == 3]
        decisions.keep({"action": "block", "rule": rule, "reason": "no", "before": f"prompt {number}"})
    deadline = time.monotonic() + 10
    while sum(told().values()) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told() == {"sexual": 30, "violence": 10} and len(store.list("decisions")) == 5 + 2
    again = Decisions(store, 5)  # the run is taken up again
    again.keep({"action": "block", "rule": "sexual", "reason": "no", "before": "once more"})
    while told()["sexual"] < 31 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told() == {"sexual": 31, "violence": 10} and len(store.list("decisions")) == 5 + 2 + 1
    everything = b"".join(store.read(path) for path in store.list("decisions"))
    assert everything.count(b"prompt ") == 5 and b"once more" not in everything
