"""How the playground does under users who each ask again as soon as they are answered."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
import numpy as np

from rayproj.errors import UserError
from rayproj.responsibility.provenance import SIDECAR
from rayproj.storage.store import to_json

PERCENTILES = (50, 95, 99)
ANSWER_SECONDS = 120.0  # after which a request counts as failed
PICTURES = 16  # kept of what is answered


@dataclass
class LoadConfig:
    """A load test that the playground makes of itself once it is up; then it is done, as a stage of a chain."""

    users: int = 0  # that ask at once; 0: it serves on instead
    seconds: float = 10.0  # after which nobody asks again
    requests: int = 0  # of all users together at most; 0: any number
    prompt: str = ""  # of every request
    to: str = ""  # file for what is measured, as for judge.playground.loads
    pictures: str = ""  # folder for the first images that come, with their sidecars, as for judge.signed; "": none

    def problems(self) -> list[str]:
        found = []
        if self.users < 0 or self.requests < 0 or self.seconds <= 0:
            found.append("load.users and load.requests must not be negative, and load.seconds must be above 0.")
        if self.users and not self.to:
            found.append("load.users needs load.to, a file for what is measured.")
        if not self.users and (self.to or self.pictures):
            found.append("load.to and load.pictures need load.users, those who ask at once.")
        return found


@dataclass
class Load:
    """What was measured.

    Attributes:
        seconds: from the first question to the last answer.
        latencies: seconds of each request that was answered with images.
        images: that came.
        answers: requests by what was answered: a status of HTTP, or the kind of an error.
        model_commit: of the model that drew; "" if the playground does not say.
    """

    users: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    images: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    model_commit: str = ""

    @classmethod
    def read(cls, file: str) -> Load:
        """What `write` wrote.

        Raises:
            UserError: there is no such file, or it is none of these.
        """
        try:
            with fsspec.open(file, "rt", encoding="utf-8") as opened:
                values = json.load(opened)
            return cls(**{**values, "answers": Counter(values["answers"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"'{file}' is no file of 'rayproj playground load URL --to FILE' ({str(error).splitlines()[0]}); write one."
            ) from error

    def write(self, file: str) -> None:
        """Keep it, over what is there.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            Path(file).write_bytes(to_json(vars(self)))
        except OSError as error:
            raise UserError(f"'{file}' cannot be written ({error}); give another place.") from error

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """Of the latencies, in seconds (inverse of the empirical distribution); nan if nothing was answered."""
        if not self.latencies:
            return float("nan")
        return float(np.percentile(self.latencies, percent, method="inverted_cdf"))

    def described(self) -> dict[str, Any]:
        """For a report: without the single latencies, but with their percentiles, None if nothing was answered."""
        kept = {name: value for name, value in vars(self).items() if name != "latencies"}
        latency = {f"p{p}": self.percentile(p) if self.latencies else None for p in PERCENTILES}
        return {**kept, "images_per_second": self.images_per_second, "latency": latency}

    def __str__(self) -> str:
        spans = ", ".join(f"p{p} {self.percentile(p):.3f} s" for p in PERCENTILES)
        answers = ", ".join(f"{name}: {count}" for name, count in sorted(self.answers.items()))
        return f"{self.users} users: {self.images_per_second:.2f} images/s; {spans}; answers {answers}"


def carry_out(config: LoadConfig, url: str) -> Load:
    """Measure as configured, and keep what was measured and the pictures.

    Raises:
        UserError: a place cannot be written, or no request was answered with images.
    """
    folder, pictures = Path(config.pictures), list[dict[str, Any]]()
    try:
        for place in [Path(config.to).parent, *([folder] if config.pictures else [])]:
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"There can be no folder for load.to or load.pictures ({error}); give another place."
        ) from error
    body = {"prompt": config.prompt} if config.prompt else {}
    load = measure(url, config.users, config.seconds, body, config.requests, pictures)
    load.write(config.to)
    if not load.latencies:
        raise UserError(f"No request of the load test was answered with images: {load}; look into the server's log.")
    for image in pictures if config.pictures else ():
        file = folder / f"{image['seed']:08d}.png"
        file.write_bytes(base64.b64decode(image["png"]))
        if image["provenance"]:
            Path(f"{file}{SIDECAR}").write_text(image["provenance"])
    return load


def measure(
    url: str,
    users: int,
    seconds: float,
    body: dict[str, Any] | None = None,
    requests: int = 0,
    pictures: list[dict[str, Any]] | None = None,
) -> Load:
    """Ask a playground on this machine.

    Args:
        users: that ask at once, with seeds of their own.
        seconds: after which nobody asks again; who waits then is waited for.
        body: of each request, but for its seed.
        requests: of all users together at most; 0: any number.
        pictures: gets the first `PICTURES` images, as they are answered.

    Raises:
        UserError: the URL is not of this machine, or nobody listens there.
    """
    if not _is_here(url):
        raise UserError(f"{url} is not on this machine: a load test is for http://127.0.0.1:PORT alone.")
    if users < 1 or seconds <= 0:
        raise UserError("A load test needs --users of at least 1 and --seconds above 0.")
    return asyncio.run(
        _measure(url.rstrip("/"), users, seconds, body or {}, requests, [] if pictures is None else pictures)
    )


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _measure(
    url: str, users: int, seconds: float, body: dict[str, Any], requests: int, pictures: list[dict[str, Any]]
) -> Load:
    load, asked = Load(users), 0
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        try:
            async with session.get(f"{url}/health") as answer:
                answer.raise_for_status()
                load.model_commit = (await answer.json()).get("model_commit", "")
        except (
            aiohttp.ClientError,
            TimeoutError,
            ValueError,
            AttributeError,
        ) as error:  # or what answers is another server
            raise UserError(
                f"No playground answers at {url} ({error}); start jobs/serve_playground.py first."
            ) from error
        began = time.monotonic()

        async def user() -> None:
            nonlocal asked
            while time.monotonic() - began < seconds and (not requests or asked < requests):
                asked += 1
                await _ask(session, url, {**body, "seed": asked}, load, pictures)

        await asyncio.gather(*(user() for _ in range(users)))
        load.seconds = time.monotonic() - began
    return load


async def _ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], load: Load, pictures: list[dict[str, Any]]
) -> None:
    start = time.monotonic()
    try:
        async with session.post(f"{url}/images", json=body) as answer:
            load.answers[str(answer.status)] += 1
            if answer.status == 200:
                found = await answer.json()
                load.latencies.append(time.monotonic() - start)
                shown = [image for image in found["images"] if image["png"] is not None]
                load.images += len(shown)
                pictures += shown[: PICTURES - len(pictures)]
            elif answer.status == 503:  # as it asks to
                await asyncio.sleep(min(float(answer.headers.get("Retry-After", 1)), 5.0))
    except (aiohttp.ClientError, TimeoutError) as error:
        load.answers[type(error).__name__] += 1
