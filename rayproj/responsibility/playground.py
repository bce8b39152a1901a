"""What may be asked of the playground, and how it answers: all of it that needs no server.

An image depends on the model's commit, the prompt and the other conditions, the seed, guidance and steps alone, and not on
whose images are drawn in the same batch, up to one grey level: sums of other sizes are rounded otherwise.
"""

from __future__ import annotations

import json
import math
import threading
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.config import below
from rayproj.data.dataset import Dataset, Header
from rayproj.diffusion.conditions import LABEL, Conditions
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig
from rayproj.evaluation.watermark import WatermarkConfig
from rayproj.responsibility.policy import PolicyConfig
from rayproj.responsibility.provenance import ProvenanceConfig
from rayproj.responsibility.safety import SafetyConfig
from rayproj.storage.store import Store, to_json
from rayproj.synthesis.plan import GenerateConfig, plan
from rayproj.web import asker, name_problems

SEEDS = 2**31  # seeds lie below
BODY = 1 << 16  # bytes of a request at most
DEEP = "The request is nested too deeply; properties are an object of texts, and all else is no list and no object."
DECIDED = "decisions"  # folder of a run
KIND = ("action", "rule", "reason")
PAUSE = 1.0


@dataclass
class PlaygroundConfig:
    """Which model is shown, to how many, and what they may ask for."""

    model: str = "???"  # run dir of jobs/train_diffusion.py or jobs/finetune_private.py
    ema: float = 0.0  # as generate.ema
    weak: str = ""  # as generate.weak
    sampler: SamplerConfig = field(default_factory=SamplerConfig)  # steps and guidance unless a request says others
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)
    batch: int = 8  # images that a sampler draws at once, of whoever asks
    wait_ms: float = 20.0  # how long a batch waits for more
    queue: int = 64  # images that wait or are being drawn; who asks for more is told to come back
    per_address: int = (
        16  # of these, of who asks from one address; those of this machine are a proxy's, and not counted
    )
    records: int = (
        10000  # decisions of the policy and the filter that a run keeps whole; of more, how many of each kind
    )
    max_images: int = 4  # of a request
    max_steps: int = 50
    max_guidance: float = 15.0
    max_characters: int = 300  # of a prompt
    samplers: int = 1
    cpus_per_sampler: float = 1.0
    gpus_per_sampler: float = 0.0
    host: str = "127.0.0.1"  # this machine alone; "0.0.0.0": whoever reaches it
    port: int = 8000
    # Its names, as a proxy before it has one; addresses and localhost hold too, and other names are refused.
    hosts: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        names = ("batch", "queue", "per_address", "records", "max_images", "max_steps", "max_characters", "samplers")
        found = [f"playground.{name} must be positive." for name in names if getattr(self, name) <= 0]
        found += below(0, "playground", self, "ema", "wait_ms", "cpus_per_sampler", "gpus_per_sampler")
        if not 0 < self.port < 65536:
            found.append(f"playground.port is from 1 to 65535, not {self.port}.")
        if self.sampler.weights:
            found.append("playground.sampler.weights: requests say one guidance; leave the weights out.")
        for name in ("queue", "per_address"):
            if self.max_images > getattr(self, name):
                found.append(
                    f"playground.max_images must not exceed playground.{name}, or a request could never be served."
                )
        if self.sampler.steps > self.max_steps or self.sampler.guidance > self.max_guidance:
            found.append("playground.sampler has more steps or guidance than playground.max_steps or max_guidance.")
        return found + name_problems(self.hosts, "playground.hosts")


@dataclass(frozen=True)
class Asked:
    """One image that somebody asks for.

    Attributes:
        values: property or label -> the number of its value.
    """

    prompt: str
    values: tuple[tuple[str, int], ...]
    seed: int
    guidance: float
    steps: int


@dataclass(frozen=True)
class Offer:
    """What a model can be asked for.

    Attributes:
        choices: label and properties -> their values.
        text: whether it takes a prompt.
    """

    choices: dict[str, list[str]]
    text: bool


class Refused(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP.
        where: what in the request is wrong; "" for all of it.
        more: for the answer, besides the sentence.
    """

    def __init__(self, status: int, sentence: str, where: str = "", **more: Any) -> None:
        super().__init__(sentence)
        self.status, self.where, self.more = status, where, more


class Places:
    """Images that wait or are being drawn, and who asked for them.

    Attributes:
        waiting: images.
        pace: seconds between two images, a running mean.
    """

    def __init__(self, queue: int, per_address: int) -> None:
        self.queue, self.per_address = queue, per_address
        self.waiting, self.pace = 0, 0.0
        self._of = Counter[str]()

    @contextmanager
    def taken(self, images: int, address: str) -> Iterator[None]:
        """Places for the images of a request while a block runs.

        Raises:
            Refused: 503 where there are no more, 429 where this address has as many as it may; with when to come back.
        """
        of, seconds = asker(address), max(1, math.ceil(self.waiting * self.pace))
        then: dict[str, Any] = {"retry_after": seconds, "waiting": self.waiting}
        if of and self._of[of] + images > self.per_address:
            raise Refused(429, f"Too many images of yours are waiting; ask again in {seconds} s.", **then)
        if self.waiting + images > self.queue:
            raise Refused(503, f"Too many images are waiting; ask again in {seconds} s.", **then)
        self.waiting += images
        self._of[of] += images
        try:
            yield
        finally:
            self.waiting -= images
            self._of[of] -= images
            if not self._of[of]:
                del self._of[of]

    def paced(self, seconds: float, images: int) -> None:
        """As many images took so long."""
        each = seconds / (self.waiting + images)
        self.pace = each if self.pace == 0 else 0.8 * self.pace + 0.2 * each


class Decisions:
    """What was not simply allowed, in the folder decisions/ of a run: the first `whole` records each in a file, so that all
    can be read; of what comes after them, which may be somebody who asks again and again, how many there were of each kind,
    in a file that is written anew every `PAUSE` seconds at most."""

    def __init__(self, store: Store, whole: int) -> None:
        self.store, self.left = store, whole - len(store.list(DECIDED))
        self._more, self._lock = Counter[tuple[str, ...]](), threading.Lock()
        self._timer: threading.Timer | None = None
        self._name = f"{time.time():.3f}-{uuid.uuid4().hex[:8]}"

    def keep(self, record: dict[str, Any]) -> None:
        with self._lock:
            self.left -= 1
            whole = self.left >= 0
            if not whole:
                self._more[tuple(record[name] for name in KIND)] += 1
                if self._timer is None:
                    self._timer = threading.Timer(PAUSE, self._count)
                    self._timer.daemon = True
                    self._timer.start()
        if whole:
            path = f"{DECIDED}/{time.time():.3f}-{uuid.uuid4().hex[:8]}.json"
            self.store.put_once(path, to_json({**record, "at": time.time()}))

    def _count(self) -> None:
        with self._lock:
            self._timer, counts = None, list(self._more.items())
        for number, (kind, count) in enumerate(counts):  # in the order in which they first came, which stays
            said = {**dict(zip(KIND, kind, strict=True)), "count": count}
            self.store.write(f"{DECIDED}/{self._name}-{number:03d}.json", to_json(said))


def planned(config: PlaygroundConfig) -> Header:
    """The plan of `jobs/generate.py` for such images: model, commit, certificate, sampler, watermark.

    Raises:
        UserError: the model's run is not there or has no commit, or cannot draw by itself.
    """
    generate = GenerateConfig(
        model=config.model,
        out="",
        ema=config.ema,
        weak=config.weak,
        samples=SEEDS,
        sampler=config.sampler,
        watermark=config.watermark,
        safety=config.safety,
    )
    return plan(generate, seed=0)


def offer_of(model: str) -> Offer:
    """What the model of a run can be asked for."""
    diffusion = configuration.section(DiffusionConfig, Store(model).read("config.yaml"), "diffusion")
    latents = Dataset.open(diffusion.latents).header
    conditions = Conditions.of(diffusion.conditioned, latents)
    return Offer({name: list(latents.values_of(name)) for name in conditions.values}, bool(conditions.text))


def read(body: bytes) -> Any:
    """The JSON of a request.

    Raises:
        Refused: 400, it is none.
    """
    try:
        return json.loads(body)
    except RecursionError:
        raise Refused(400, DEEP) from None
    except ValueError:
        raise Refused(400, 'The request is no JSON; send an object, such as {"prompt": "a red heart"}.') from None


def parse(body: Any, config: PlaygroundConfig, offer: Offer) -> list[Asked]:
    """The images that a request asks for, seeds in a row.

    Args:
        body: {"prompt": text, "label": name, "properties": {name: value}, "seed", "guidance", "steps", "images"}, each of
            them optional.

    Raises:
        Refused: 400, with what is wrong and how it would be right.
    """
    if not isinstance(body, dict):
        raise Refused(400, 'The request is to be a JSON object, such as {"prompt": "a red heart", "seed": 1}.')
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except RecursionError:
            raise Refused(400, DEEP) from None
        except UnicodeEncodeError:  # before the tokenizer, a record or an answer that repeats it fails at it
            where = name if name.isprintable() else ""  # it stands in the answer too
            raise Refused(
                400, "The request holds half a character (a lone surrogate); send whole ones.", where
            ) from None
    known = ("prompt", "label", "properties", "seed", "guidance", "steps", "images")
    if unknown := sorted(set(map(str, body)) - set(known)):
        raise Refused(400, f"There is no '{unknown[0]}'; a request has {', '.join(known)}.", unknown[0])
    prompt = body.get("prompt") or ""
    if not isinstance(prompt, str):
        raise Refused(400, "prompt must be a text.", "prompt")
    prompt = " ".join(prompt.split())
    if any(unicodedata.category(character) in ("Cc", "Co") for character in prompt):
        raise Refused(400, "prompt has control characters or such for private use; send it without them.", "prompt")
    if prompt and not offer.text:
        raise Refused(400, f"This model takes no prompt; choose by {', '.join(offer.choices) or 'the seed'}.", "prompt")
    if len(prompt) > config.max_characters:
        raise Refused(
            400, f"prompt has {len(prompt)} characters; shorten it to {config.max_characters} at most.", "prompt"
        )
    seed = int(_number(body, "seed", 0, 0, SEEDS - config.max_images, whole=True))
    images = int(_number(body, "images", 1, 1, config.max_images, whole=True))
    steps = int(_number(body, "steps", config.sampler.steps, 1, config.max_steps, whole=True))
    guidance = _number(body, "guidance", config.sampler.guidance, 0, config.max_guidance)
    values = _values(body, offer)
    return [Asked(prompt, values, seed + i, guidance, steps) for i in range(images)]


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float, whole: bool = False) -> float:
    value = body.get(name)
    value = default if value is None else value
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not sound or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise Refused(
            400, f"{name} must be {kind} from {low:g} to {high:g}, not {json.dumps(value, default=str)[:40]}.", name
        )
    return float(value)


def _values(body: dict[str, Any], offer: Offer) -> tuple[tuple[str, int], ...]:
    given = body.get("properties") or {}
    if not isinstance(given, dict):
        raise Refused(400, 'properties must be an object, such as {"style": "flat"}.', "properties")
    given = {**given, **({LABEL: body["label"]} if body.get("label") else {})}
    found = []
    for name, value in given.items():
        if name not in offer.choices:
            raise Refused(400, f"This model has no '{name}'; it has {', '.join(offer.choices) or 'none'}.", name)
        if value not in offer.choices[name]:
            some = ", ".join(offer.choices[name][:12])
            raise Refused(400, f"{name} cannot be {str(value)[:40]!r}; choose one of {some}.", name)
        found.append((name, offer.choices[name].index(value)))
    return tuple(sorted(found))
