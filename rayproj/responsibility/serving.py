"""The playground on Ray Serve: one door, which judges, counts and signs, and samplers behind it, which draw batches of
images of whoever asks.

    prompt → policy → sampler → safety rules → watermark → PNG → provenance
"""

# Serve takes its classes by value when they are decorated: what they use must stand before them, and their annotations
# must be values, not names that FastAPI could not look up in an actor.

import asyncio
import base64
import json
import logging
import math
import os
import time
import uuid
from collections import Counter
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from rayproj import config as configuration
from rayproj.data.dataset import Header
from rayproj.data.encodings import ENCODINGS
from rayproj.diffusion.conditions import TEXT
from rayproj.evaluation.watermark import mark, read_key
from rayproj.responsibility.playground import BODY, Asked, Offer, PlaygroundConfig, Refused, parse
from rayproj.responsibility.policy import Action, Decision, PromptPolicy
from rayproj.responsibility.provenance import Signer, facts_of
from rayproj.responsibility.safety import Safety
from rayproj.storage.store import Store, sha256_hex, to_json
from rayproj.synthesis.synthesizer import planned_model
from rayproj.web import refusal

APPLICATION = "playground"
Drawn = tuple[np.ndarray | None, list[str]]
"""uint8 [C, H, W], or None and the safety rules that it did not pass."""

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.deployment(max_ongoing_requests=1024)
class Sampler:
    """Draws what comes together in one batch. Blocks no event loop, so that its health is seen while it draws."""

    def __init__(self, values: dict[str, Any], header: bytes, folder: str) -> None:
        os.chdir(folder)  # relative paths of a config mean the driver's folder
        self.config = configuration.from_dict(PlaygroundConfig, values)
        torch.set_num_threads(max(1, int(self.config.cpus_per_sampler)))
        self.device = "cuda:0" if self.config.gpus_per_sampler else "cpu"
        self.model = planned_model(Header.from_json(header), self.device)
        if self.model.conditions.text:
            self.model.text([""])  # loaded now, not for the first who asks
        self.safety = Safety(self.config.safety, self.device)
        self.secret = read_key(self.config.watermark.key) if self.config.watermark.key else b""
        batches: Any = self.draw
        batches.set_max_batch_size(self.config.batch)
        batches.set_batch_wait_timeout_s(self.config.wait_ms / 1000)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def draw(self, asked: list[Asked]) -> list[Drawn]:
        return await asyncio.to_thread(self._draw, asked)

    def _draw(self, asked: list[Asked]) -> list[Drawn]:
        found: list[Drawn] = [(None, [])] * len(asked)
        for steps in {one.steps for one in asked}:
            places = [i for i, one in enumerate(asked) if one.steps == steps]
            for place, drawn in zip(places, self._together([asked[i] for i in places]), strict=True):
                found[place] = drawn
        return found

    def _together(self, asked: list[Asked]) -> list[Drawn]:
        """Images of as many steps."""
        condition = self.model.conditions.nothing(len(asked), self.device)
        for name in self.model.conditions.values:
            numbers = [dict(one.values).get(name, -1) for one in asked]
            condition[name] = torch.tensor(numbers, device=self.device)
        if self.model.conditions.text:
            condition[TEXT] = self.model.text([one.prompt for one in asked])
        ids = torch.tensor([one.seed for one in asked], device=self.device)
        scales = torch.tensor([one.guidance for one in asked], device=self.device)
        sampler = configuration.from_dict(type(self.config.sampler), {
            **configuration.to_dict(self.config.sampler), "steps": asked[0].steps,
        })  # fmt: skip
        images = self.model.draw(condition, ids, 0, sampler, scales).cpu().numpy()
        reasons = self.safety.reasons(images)
        if self.secret:
            images = mark(images, self.secret, self.config.watermark.strength)
        return [(None if why else image, why) for image, why in zip(images, reasons, strict=True)]


async def _json(request: Request) -> Any:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY:
            raise Refused(413, f"The request is larger than {BODY // 1024} KiB; shorten it.")
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except ValueError:
        raise Refused(400, 'The request is no JSON; send an object, such as {"prompt": "a red heart"}.') from None


@serve.deployment(num_replicas=1, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Playground:
    """The door: validates, asks the policy, counts who waits, and signs what leaves."""

    def __init__(
        self, values: dict[str, Any], header: bytes, offer: Offer, page: str, run: str, folder: str, sampler: Any
    ) -> None:
        os.chdir(folder)
        self.config = configuration.from_dict(PlaygroundConfig, values)
        self.provenance, self.offer, self.page = Header.from_json(header).provenance, offer, page
        self.sampler, self.store = sampler, Store(run)
        self.policy = PromptPolicy(self.config.policy)
        self.signer = Signer(self.config.provenance) if self.config.provenance.key else None
        self.waiting = 0  # images
        self.pace = 0.0  # seconds between two images, a running mean
        self.counts = Counter[str]()

    @app.get("/", response_class=HTMLResponse)
    async def show(self, request: Request) -> HTMLResponse:
        if wrong := self._refusal(request):
            raise HTTPException(*wrong)
        inline = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        rules = f"default-src 'none'; img-src data:; connect-src 'self'; {inline}"
        return HTMLResponse(self.page, headers={"Content-Security-Policy": rules})

    @app.get("/health")
    async def health(self, request: Request) -> dict[str, Any]:
        if wrong := self._refusal(request):
            raise HTTPException(*wrong)
        said = {name: self.provenance[name] for name in ("model_commit", "model_step")}
        return {"status": "ok", **said, "waiting": self.waiting, "counts": dict(sorted(self.counts.items()))}

    @app.post("/images")
    async def images(self, request: Request) -> Response:
        try:
            return JSONResponse(await self._images(request))
        except Refused as refused:
            self.counts[f"answered {refused.status}"] += 1
            wait = refused.more.pop("retry_after", None)
            content = {"error": str(refused), "where": refused.where, **refused.more}
            return JSONResponse(content, refused.status, {"Retry-After": str(wait)} if wait else None)
        except Exception:
            logging.getLogger("ray.serve").exception("a request failed")
            self.counts["answered 500"] += 1
            content = {"error": "The image could not be drawn; try again, and look into the server's log.", "where": ""}
            return JSONResponse(content, 500)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        return refusal(request.method, request.headers, [self.config.host, *self.config.hosts])

    async def _images(self, request: Request) -> dict[str, Any]:
        began = time.monotonic()
        if wrong := self._refusal(request):
            raise Refused(*wrong)
        asked = parse(await _json(request), self.config, self.offer)
        decision = await asyncio.to_thread(self.policy.decide, asked[0].prompt)
        self.counts[decision.action.value] += 1  # also what is simply allowed, so that shares can be told
        if decision.action is not Action.allow or decision.rule:
            await asyncio.to_thread(self._record, decision.record())
        said = {"action": decision.action.value, "rule": decision.rule, "reason": decision.reason}
        if decision.action is Action.block:
            raise Refused(403, f"The prompt is not drawn: {decision.reason}. Ask for something else.", "prompt", **said)
        if self.waiting + len(asked) > self.config.queue:
            seconds = max(1, math.ceil(self.waiting * self.pace))
            raise Refused(
                503,
                f"Too many images are waiting; ask again in {seconds} s.",
                retry_after=seconds,
                waiting=self.waiting,
            )
        asked = [Asked(decision.prompt, a.values, a.seed, a.guidance, a.steps) for a in asked]
        self.waiting += len(asked)
        try:
            found = await asyncio.gather(*(self.sampler.draw.remote(one) for one in asked))
        finally:
            self.waiting -= len(asked)
        self._paced(time.monotonic() - began, len(asked))
        images = await asyncio.to_thread(self._finished, decision, asked, found)
        self.counts["images"] += sum(image["png"] is not None for image in images)
        self.counts["withhold"] += sum(image["png"] is None for image in images)
        return {
            "prompt": decision.prompt,
            "decision": said,
            "model_commit": self.provenance["model_commit"],
            "images": images,
            "seconds": time.monotonic() - began,
        }

    def _paced(self, seconds: float, images: int) -> None:
        each = seconds / (self.waiting + images)
        self.pace = each if self.pace == 0 else 0.8 * self.pace + 0.2 * each

    def _finished(self, decision: Decision, asked: list[Asked], found: list[Drawn]) -> list[dict[str, Any]]:
        return [self._image(decision, one, image, why) for one, (image, why) in zip(asked, found, strict=True)]

    def _image(self, decision: Decision, asked: Asked, image: np.ndarray | None, why: list[str]) -> dict[str, Any]:
        said: dict[str, Any] = {"seed": asked.seed, "png": None, "withheld": why, "provenance": None}
        if image is None:
            record = {**decision.record(), "action": "withhold", "rule": ", ".join(why), "seed": asked.seed}
            self._record({**record, "reason": "the image did not pass the safety rules"})
            return said
        png = ENCODINGS["png"].encode(image)
        if self.signer:
            conditions = {name: self.offer.choices[name][number] for name, number in asked.values}
            facts = facts_of(self.provenance, asked.prompt, asked.seed, asked.guidance, asked.steps, conditions)
            if self.signer.embeds:
                png = self.signer.embedded(png, "png", facts)
            else:
                said["provenance"] = self.signer.sidecar(sha256_hex(png), facts).decode()  # as it was signed
        return {**said, "png": base64.b64encode(png).decode()}

    def _record(self, record: dict[str, Any]) -> None:
        """Into the run: what was not simply allowed."""
        path = f"decisions/{time.time():.3f}-{uuid.uuid4().hex[:8]}.json"
        self.store.put_once(path, to_json({**record, "at": time.time()}))


def start(config: PlaygroundConfig, header: Header, offer: Offer, page: str, run: str) -> str:
    """Bring the playground up on the Ray cluster that the process is connected to; returns its address.

    Args:
        page: the HTML of "/".
        run: where decisions are recorded.
    """
    values, folder, described = configuration.to_dict(config), os.getcwd(), header.to_json()
    options = {"num_cpus": config.cpus_per_sampler, "num_gpus": config.gpus_per_sampler}
    sampler = Sampler.options(  # type: ignore[attr-defined]
        num_replicas=config.samplers,
        ray_actor_options=options,
        max_ongoing_requests=max(config.queue, config.batch),
    ).bind(values, described, folder)
    door = Playground.bind(values, described, offer, page, run, folder, sampler)  # type: ignore[attr-defined]
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=config.host, port=config.port))
    serve.run(door, name=APPLICATION, route_prefix="/", logging_config={"enable_access_log": False})
    return f"http://{config.host}:{config.port}"


def stop() -> None:
    serve.shutdown()
