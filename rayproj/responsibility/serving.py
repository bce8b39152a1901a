"""The playground on Ray Serve: one door, which judges, counts and signs, and samplers behind it, which draw batches of
images of whoever asks.

    prompt → policy → sampler → safety rules → watermark → PNG → provenance
"""

# Serve takes its classes by value when they are decorated: what they use must stand before them, and their annotations
# must be values, not names that FastAPI could not look up in an actor.

import asyncio
import base64
import logging
import os
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.middleware import Middleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from ray import serve

from rayproj import config as configuration
from rayproj.data.dataset import Header
from rayproj.data.encodings import ENCODINGS
from rayproj.diffusion.conditions import TEXT
from rayproj.evaluation.watermark import mark, read_key
from rayproj.responsibility.playground import (
    BODY,
    Asked,
    Decisions,
    Offer,
    Places,
    PlaygroundConfig,
    Refused,
    parse,
    read,
)
from rayproj.responsibility.policy import Action, Decision, PromptPolicy
from rayproj.responsibility.provenance import Signer, facts_of
from rayproj.responsibility.safety import Safety
from rayproj.storage.store import Store, sha256_hex
from rayproj.synthesis.synthesizer import planned_model
from rayproj.web import Guarded

POLICY = "img-src data:; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
Drawn = tuple[np.ndarray | None, list[str]]
"""uint8 [C, H, W], or None and the safety rules that it did not pass."""


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


@serve.deployment(num_replicas=1, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
@serve.ingress()
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
        self.places = Places(self.config.queue, self.config.per_address)
        self.decisions = Decisions(self.store, self.config.records)
        self.counts = Counter[str]()

    def __serve_build_asgi_app__(self) -> FastAPI:
        hosts = [self.config.host, *self.config.hosts]
        guard = Middleware(Guarded, hosts=hosts, policy=POLICY, largest=BODY)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[guard])
        app.add_api_route("/", self.show, response_class=HTMLResponse)
        app.add_api_route("/health", self.health)
        app.add_api_route("/images", self.images, methods=["POST"])
        return app

    async def show(self) -> HTMLResponse:
        return HTMLResponse(self.page)

    async def health(self) -> dict[str, Any]:
        said = {name: self.provenance[name] for name in ("model_commit", "model_step")}
        return {"status": "ok", **said, "waiting": self.places.waiting, "counts": dict(sorted(self.counts.items()))}

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

    async def _images(self, request: Request) -> dict[str, Any]:
        began = time.monotonic()
        asked = parse(read(await request.body()), self.config, self.offer)
        with self.places.taken(len(asked), request.client.host if request.client else ""):
            decision = await self._decided(asked[0].prompt)
            asked = [Asked(decision.prompt, a.values, a.seed, a.guidance, a.steps) for a in asked]
            found = await asyncio.gather(*(self.sampler.draw.remote(one) for one in asked))
        self.places.paced(time.monotonic() - began, len(asked))
        images = await asyncio.to_thread(self._finished, decision, asked, found)
        self.counts["images"] += sum(image["png"] is not None for image in images)
        self.counts["withhold"] += sum(image["png"] is None for image in images)
        return {
            "prompt": decision.prompt,
            "decision": told(decision),
            "model_commit": self.provenance["model_commit"],
            "images": images,
            "seconds": time.monotonic() - began,
        }

    async def _decided(self, prompt: str) -> Decision:
        decision = await asyncio.to_thread(self.policy.decide, prompt)
        self.counts[decision.action.value] += 1  # also what is simply allowed, so that shares can be told
        if decision.action is not Action.allow or decision.rule:
            await asyncio.to_thread(self.decisions.keep, decision.record())
        if decision.action is Action.block:
            sentence = f"The prompt is not drawn: {decision.reason}. Ask for something else."
            raise Refused(403, sentence, "prompt", **told(decision))
        return decision

    def _finished(self, decision: Decision, asked: list[Asked], found: list[Drawn]) -> list[dict[str, Any]]:
        return [self._image(decision, one, image, why) for one, (image, why) in zip(asked, found, strict=True)]

    def _image(self, decision: Decision, asked: Asked, image: np.ndarray | None, why: list[str]) -> dict[str, Any]:
        said: dict[str, Any] = {"seed": asked.seed, "png": None, "withheld": why, "provenance": None}
        if image is None:
            record = {**decision.record(), "action": "withhold", "rule": ", ".join(why), "seed": asked.seed}
            self.decisions.keep({**record, "reason": "the image did not pass the safety rules"})
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


def told(decision: Decision) -> dict[str, str]:
    """What who asked hears of it."""
    return {"action": decision.action.value, "rule": decision.rule, "reason": decision.reason}


def bound(config: PlaygroundConfig, header: Header, offer: Offer, page: str, run: str) -> Any:
    """The playground, for `serve.run`.

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
    return Playground.bind(values, described, offer, page, run, folder, sampler)  # type: ignore[attr-defined]
