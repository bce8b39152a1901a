"""The application over real HTTP, without Ray: who gets in, what is told, what is refused, and that nothing counts twice."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from rayproj.data.encodings import decode_image
from rayproj.preferences import ratings
from rayproj.preferences.images import prepare
from rayproj.preferences.plan import Plan, Question
from rayproj.preferences.study import SetConfig, StudyConfig
from rayproj.preferences.tokens import Seal, issue
from rayproj.storage.store import Store
from tests.support import drawn

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
MODELS = {"modest-secret-name": 1, "splendid-secret-name": 4}
PROMPTS = [f"prompt number {i}" for i in range(6)]


@contextmanager
def served(uri: str) -> Iterator[str]:
    from rayproj.preferences.app import application

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application(uri, hosts=["raters.example"]), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def study(folder: Path, **changes: Any) -> tuple[Plan, Store]:
    for name, strength in MODELS.items():
        drawn.write(f"{folder}/{name}", strength, PROMPTS)
    drawn.write(f"{folder}/photos", 3, PROMPTS, field="caption")
    (folder / "p.csv").write_text("prompt,category,object,number\n" + "".join(f"{p},c,dots,4\n" for p in PROMPTS))
    sets = {
        "main": SetConfig(str(folder / "p.csv"), [q for q in Question if q is not Question.detailed]),
        "photo": SetConfig(str(folder / "p.csv"), [Question.detailed], f"{folder}/photos"),
    }
    given: dict[str, Any] = {"ratings": 6, "per_rater": 100, "share": 1.0, "block": 4, **changes}
    store = Store(f"{folder}/run")
    return prepare(StudyConfig({n: f"{folder}/{n}" for n in MODELS}, sets, **given), store, 0), store


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Plan, Store, str]]:
    of, store = study(tmp_path)
    with served(store.uri) as address:
        yield of, store, address


def client(address: str, store: Store) -> requests.Session:
    session = requests.Session()
    answer = session.post(f"{address}/api/session", json={"token": issue(store, 1)[0]})
    assert answer.status_code == 204
    return session


def answer_to(task: dict[str, Any], session: requests.Session, address: str) -> str | int:
    """A rater who prefers the stronger model, as the pictures show, and is attentive."""
    if "attention" in task["text"]:
        word = task["text"].rstrip(".").rpartition(" ")[2]
        return int(word) if word.isdigit() else str(word)
    seen = {side: session.get(f"{address}/api/task/{task['id']}/{side}").content for side in task["images"]}
    strength = {side: int(decode_image(data)[0, 0, 0]) // drawn.STRENGTH for side, data in seen.items()}
    return strength["only"] if "only" in strength else max(strength, key=strength.__getitem__)


def test_a_rater_completes_a_study_and_nothing_tells_the_models(running: tuple[Plan, Store, str]) -> None:
    of, store, address = running
    session, heard, kinds = client(address, store), [], set()
    state = session.get(f"{address}/api/task").json()
    while task := state["task"]:
        assert state["done"] < state["total"] == of.slots
        assert session.get(f"{address}/api/task").json()["task"] == task, "a reload shows the same"
        kinds.add((task["text"], bool(task["prompt"]), task["reference"], len(task["images"])))
        for side in [*task["images"], *(["reference"] if task["reference"] else [])]:
            got = session.get(f"{address}/api/task/{task['id']}/{side}")
            assert got.headers["content-type"] == "image/png" and got.headers["cache-control"] == "no-store"
            heard += [got.content, str(got.headers).encode(), got.url.encode()]
        sent = {"task": task["id"], "answer": answer_to(task, session, address), "seconds": 2.5}
        got = session.post(f"{address}/api/rating", json=sent)
        again = session.post(f"{address}/api/rating", json=sent)
        assert got.status_code == again.status_code == 200 and got.json() == again.json()
        heard += [got.content, str(got.headers).encode()]
        state = got.json()
    assert state == {"done": of.slots, "total": of.slots, "task": None}
    everything = b"\n".join(heard)
    for name in [*MODELS, "secret", "drawn", "generate"]:
        assert name.encode() not in everything
    with_prompt = {text for text, prompt, _, _ in kinds if prompt and "attention" not in text}
    assert with_prompt == {t for t in with_prompt if "prompt" in t} and len(with_prompt) == 2
    assert all(prompt is False for text, prompt, _, _ in kinds if "appealing" in text or "How many" in text)
    found = ratings.all_of(store, False)
    assert sorted(r.number for r in found) == list(range(of.slots))
    for one in found:
        task_of = of.task(one.number)
        if task_of.question is Question.count:
            assert one.answer == MODELS[task_of.models[0]]
        else:
            assert task_of.models[["left", "right"].index(str(one.answer))].startswith("splendid")
    checks = ratings.all_of(store, True)
    assert len(checks) >= of.slots // of.block and not ratings.inattentive(of, checks)


def test_nobody_else_gets_in(running: tuple[Plan, Store, str]) -> None:
    _, store, address = running
    session = client(address, store)
    task = session.get(f"{address}/api/task").json()["task"]
    rating = {"task": task["id"], "answer": "left", "seconds": 1}
    image = f"{address}/api/task/{task['id']}/left"
    for cookies in ({}, {"rater": "r0001-" + "a" * 22}, {"rater": "x"}):
        assert requests.get(f"{address}/api/task", cookies=cookies).status_code == 401
        assert requests.get(image, cookies=cookies).status_code == 401
        assert requests.post(f"{address}/api/rating", json=rating, cookies=cookies).status_code == 401
    assert requests.post(f"{address}/api/session", json={"token": "r0001-" + "a" * 22}).status_code == 401
    other = client(address, store)
    assert other.get(image).status_code == 404, "another rater's task"
    assert other.post(f"{address}/api/rating", json=rating).status_code == 404
    assert session.get(image).status_code == 200 and not store.list("ratings")
    for path in ("docs", "openapi.json", "redoc", "secret", "study.json", "../secret", "images/"):
        assert requests.get(f"{address}/{path}").status_code == 404
    store.delete_tree("raters/r0001.json")
    assert session.get(image).status_code == 401, "shut out"


def test_the_cookie_and_the_headers_guard(running: tuple[Plan, Store, str]) -> None:
    _, store, address = running
    got = requests.post(f"{address}/api/session", json={"token": issue(store, 1)[0]})
    cookie = got.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    for path in ("", "study.js", "style.css", "nothing"):
        headers = requests.get(f"{address}/{path}").headers
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in str(headers)
        assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    page = requests.get(address).text
    assert "http" not in page.replace("http-equiv", ""), "nothing comes from elsewhere"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, requests.Session, str, str]]:
    """A rater who is asked about two images: store, session, address, task."""
    _, store = study(tmp_path_factory.mktemp("asked"), block=0)
    with served(store.uri) as address:
        session = client(address, store)
        while len((task := session.get(f"{address}/api/task").json()["task"])["images"]) == 1:
            body = {"task": task["id"], "answer": 4, "seconds": 1}
            assert session.post(f"{address}/api/rating", json=body).status_code == 200
        yield store, session, address, task["id"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"answer": "both"}, 422),
        ({"answer": 3}, 422),
        ({"answer": True}, 422),
        ({"answer": None}, 422),
        ({"answer": -1}, 422),
        ({"answer": 1000}, 422),
        ({"seconds": -1}, 422),
        ({"seconds": "soon"}, 422),
        ({"seconds": 1e9}, 422),
        ({"task": "A" * 34}, 404),
        ({"task": "../../secret"}, 422),
        ({"task": "A" * 35}, 422),
        ({"model": "splendid"}, 422),
    ],
)
def test_what_is_no_answer_is_refused_and_changes_nothing(
    asked: tuple[Store, requests.Session, str, str], changes: dict[str, Any], status: int
) -> None:
    store, session, address, task = asked
    before = store.list()
    body = {"task": task, "answer": "left", "seconds": 1, **changes}
    assert session.post(f"{address}/api/rating", json=body).status_code == status
    assert session.get(f"{address}/api/task/{task}/only").status_code == 404
    assert store.list() == before


def test_other_sites_and_odd_bodies_are_refused(running: tuple[Plan, Store, str]) -> None:
    _, store, address = running
    session = client(address, store)
    task = session.get(f"{address}/api/task").json()["task"]
    body = {"task": task["id"], "answer": "left", "seconds": 1}
    url = f"{address}/api/rating"
    for site in ("cross-site", "same-site"):
        assert session.post(url, json=body, headers={"Sec-Fetch-Site": site}).status_code == 403
    assert session.post(url, data=body).status_code == 415
    assert session.post(url, data="{" * 5000, headers={"Content-Type": "application/json"}).status_code == 413
    chunks = {"data": iter([b"{" * 3000, b"{" * 2000]), "headers": {"Content-Type": "application/json"}}
    assert session.post(url, **chunks).status_code == 413, "whatever length is said"
    assert session.post(url, data="{", headers={"Content-Type": "application/json"}).status_code == 422
    for path in ("", "study.js", "api/task", f"api/task/{task['id']}/left"):
        got = session.get(f"{address}/{path}", headers={"Host": "evil.example:8000"})
        assert got.status_code == 421 and "list the name as hosts" in got.text, "a name turned to this server"
    assert session.get(address, headers={"Host": "Raters.example"}).status_code == 200, "it is listed"
    rebound = {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}
    assert session.post(url, json=body, headers=rebound).status_code == 421
    assert not store.list("ratings") and not store.list("checks")


def test_what_cannot_be_answered_is_no_fault_of_the_server(running: tuple[Plan, Store, str]) -> None:
    _, store, address = running
    session, json = client(address, store), {"Content-Type": "application/json"}
    for data in (b'{"task": "\\ud800", "answer": "left", "seconds": 1}', b'{"\\ud800": 1}', b"[" * 4000, b"\xff", b"{"):
        assert session.post(f"{address}/api/rating", data=data, headers=json).status_code in (400, 422)
        assert session.post(f"{address}/api/session", data=data, headers=json).status_code in (400, 422)
    task = session.get(f"{address}/api/task").json()["task"]
    for path in store.list("images"):
        store.delete_tree(path)
    got = session.get(f"{address}/api/task/{task['id']}/{task['images'][0]}")
    assert got.status_code == 404 and "start jobs/serve_study.py again" in got.json()["detail"]
    store.write("raters/r0001.json", b"{")
    got = session.get(f"{address}/api/task")
    assert got.status_code == 500 and "frame-ancestors 'none'" in got.headers["content-security-policy"]
    assert "Traceback" not in got.text and got.headers["cache-control"] == "no-store"


def test_several_servers_and_many_clicks_count_once_and_raters_go_on_elsewhere(tmp_path: Path) -> None:
    _, store = study(tmp_path, block=0)
    with served(store.uri) as one, served(store.uri) as other, ThreadPoolExecutor(8) as threads:
        token = issue(store, 1)[0]
        cookies = {"rater": token}
        for number in range(10):
            state = requests.get(f"{(one, other)[number % 2]}/api/task", cookies=cookies).json()
            assert state["done"] == number
            task = state["task"]
            body = {"task": task["id"], "answer": "left" if len(task["images"]) == 2 else 4, "seconds": 1}
            places = [f"{address}/api/rating" for address in (one, other) * 4]
            sent = threads.map(lambda url: requests.post(url, json=body, cookies=cookies), places)  # noqa: B023
            assert all(got.status_code == 200 and got.json()["done"] == number + 1 for got in sent)
    found = ratings.all_of(store, False)
    assert len(found) == 10 == len({r.number for r in found})


def test_two_tabs_do_not_exceed_a_quota(tmp_path: Path) -> None:
    _, store = study(tmp_path, block=0, per_rater=1)
    with served(store.uri) as address:
        first, second = client(address, store), client(address, store)
        stale = first.get(f"{address}/api/task").json()["task"]
        # Another rater takes that slot, so that the first rater's second tab shows another task.
        slot = Seal.of(store).turn(stale["id"], "r0001")
        assert slot
        ratings.put(store, ratings.Rating("r0002", False, slot.number, "left", 1.0, 0.0))
        time.sleep(ratings.LOOK_SECONDS + 0.2)
        other = first.get(f"{address}/api/task").json()["task"]
        assert other["id"] != stale["id"]
        for task in (other, stale):
            body = {"task": task["id"], "answer": "left" if len(task["images"]) == 2 else 4, "seconds": 1}
            assert first.post(f"{address}/api/rating", json=body).json()["task"] is None
        assert len(store.list("ratings/r0001")) == 1
        assert second.get(f"{address}/api/task").json()["task"] is None
