"""The study as a web application: pages, images and ratings over HTTP. All that matters lies in the store; what a
server remembers can be lost at any time, and there may be several.

A rater's browser never learns a model: tasks have sealed ids, images are asked for by task and side, were encoded
anew without metadata, and are not cached. The question's number and the attention checks' answers stay here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import Cookie, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from rayproj.data.prompts import MOST
from rayproj.preferences import ratings
from rayproj.preferences.plan import LEFT, RIGHT, Question, Task, open_plan
from rayproj.preferences.ratings import Progress, Rating
from rayproj.preferences.tokens import REFERENCE, Seal, rater_of
from rayproj.storage.store import Store
from rayproj.web import Guarded

COOKIE = "rater"
DAYS = 30
LARGEST = 4096  # bytes of a request's body
ONLY = "only"
PAGES = {"": "index.html", "style.css": "style.css", "study.js": "study.js"}
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
POLICY = "script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
TEXTS = {
    Question.overall: "Imagine that you wrote this prompt. Which image would you rather have?",
    Question.alignment: "Which image shows better what the prompt says?",
    Question.appeal: "Which image is more appealing to you?",
    Question.detailed: "Which image is nearer to the reference photo, in what it shows and in the details?",
    Question.count: "How many of these do you see: {object}?",
}
SHOW_PROMPT = (Question.overall, Question.alignment)


class Session(BaseModel):
    """A rater's token."""

    model_config = ConfigDict(extra="forbid")
    token: str = Field(max_length=64)


class Answer(BaseModel):
    """An answer to a task."""

    model_config = ConfigDict(extra="forbid")
    task: str = Field(pattern=r"^[A-Za-z0-9_\-]{34}$")
    answer: Annotated[StrictInt, Field(ge=0, le=MOST)] | Literal["left", "indifferent", "right"]
    seconds: float = Field(ge=0, le=86400, allow_inf_nan=False)


def application(uri: str, secure: bool = False, hosts: Sequence[str] = ()) -> FastAPI:
    """The application on the study of a run.

    Args:
        uri: the run's folder, with images that are prepared.
        secure: whether raters come by https, so that their cookie goes by nothing else.
        hosts: names by which they come, besides localhost and addresses.
    """
    store = Store(uri)
    plan, seal = open_plan(store), Seal.of(store)
    progress = Progress(plan, store)
    most = min(plan.per_rater, sum(min(plan.limit, len(plan.sets[c.set])) for c in plan.comparisons))
    app = FastAPI(openapi_url=None, middleware=[Middleware(Guarded, hosts=hosts, policy=POLICY, largest=LARGEST)])

    @app.exception_handler(RequestValidationError)
    async def wrong(
        _: Request, error: RequestValidationError
    ) -> Response:  # FastAPI's own repeats what cannot be sent back
        return JSONResponse({"error": "The request has not the form of those that the page sends.", "where": ""}, 422)

    def signed_in(rater: Annotated[str | None, Cookie()] = None) -> str:
        found = rater_of(store, rater or "")
        if found is None:
            raise HTTPException(401, "Sign in first.")
        return found

    def state(rater: str) -> dict[str, Any]:
        own, checks = (ratings.own(store, rater, check) for check in (False, True))
        turn = plan.next(rater, own, checks, progress.taken())
        shown = turn and {"id": seal.task(turn, rater), **described(plan.turn(turn, rater))}
        return {"done": len(own), "total": max(most, len(own)) if turn else len(own), "task": shown}

    for path, name in PAGES.items():
        app.add_api_route(f"/{path}", _page(name), methods=["GET"])

    @app.post("/api/session", status_code=204)
    def sign_in(session: Session, response: Response) -> None:
        if rater_of(store, session.token) is None:
            raise HTTPException(401, "This token is not known.")
        response.set_cookie(
            COOKIE, session.token, max_age=DAYS * 86400, secure=secure, httponly=True, samesite="strict"
        )

    @app.get("/api/task")
    def task(rater: str = Depends(signed_in)) -> dict[str, Any]:
        return state(rater)

    @app.get("/api/task/{task}/{side}")
    def image(
        task: str, side: Literal["left", "right", "only", "reference"], rater: str = Depends(signed_in)
    ) -> Response:
        turn = seal.turn(task, rater)
        if turn is None:
            raise HTTPException(404, "There is no such task.")
        shown = plan.turn(turn, rater)
        models = dict(zip(sides(shown), shown.models, strict=True))
        if shown.question is Question.detailed:
            models["reference"] = REFERENCE + shown.comparison.set
        if side not in models:
            raise HTTPException(404, "There is no such image.")
        try:
            return Response(store.read(seal.image(models[side], shown.prompt.text)), media_type="image/png")
        except FileNotFoundError:
            raise HTTPException(404, "The image is gone; start jobs/serve_study.py again, which copies it.") from None

    @app.post("/api/rating")
    def rate(answer: Answer, rater: str = Depends(signed_in)) -> dict[str, Any]:
        turn = seal.turn(answer.task, rater)
        if turn is None:
            raise HTTPException(404, "There is no such task.")
        if (plan.turn(turn, rater).question is Question.count) != isinstance(answer.answer, int):
            raise HTTPException(422, "This is no answer to the question.")
        if turn.check or plan.allows(ratings.own(store, rater, False), turn.number):
            ratings.put(store, Rating(rater, turn.check, turn.number, answer.answer, answer.seconds, time.time()))
        return state(rater)

    return app


def _page(name: str) -> Callable[[], Response]:
    """Answers with a file of the folder `page`."""
    content = files("rayproj.preferences").joinpath("page", name).read_bytes()

    def page() -> Response:
        return Response(content, media_type=KINDS[name.rpartition(".")[2]])

    return page


def sides(task: Task) -> list[str]:
    """Names of the images of a task, as its models are ordered."""
    return [LEFT, RIGHT] if len(task.models) == 2 else [ONLY]


def described(task: Task) -> dict[str, Any]:
    """What a rater's browser is told of a task."""
    text = TEXTS[task.question].format(object=task.prompt.object)
    if task.check is not None:
        wanted = f"enter {task.check}" if isinstance(task.check, int) else f"choose the one on the {task.check}"
        text = f"This checks your attention: whatever the images show, {wanted}."
    return {
        "text": text,
        "prompt": task.prompt.text if task.question in SHOW_PROMPT else None,
        "images": sides(task),
        "reference": task.question is Question.detailed,
    }
