"""A study on Ray Serve, rated in headless Chromium as a person does it; the server is killed on the way."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests
import yaml

from rayproj import config as configuration
from rayproj.errors import UserError
from rayproj.preferences import ratings
from rayproj.preferences.plan import Question, open_plan
from rayproj.preferences.serving import ServeConfig, bound
from rayproj.preferences.tokens import issue
from rayproj.runtime.serving import serving
from rayproj.storage.store import Store, from_json
from tests.support import commands, drawn
from tests.support.commands import ROOT, environment

pytestmark = pytest.mark.xdist_group("clusters")
MODELS = {"modest": 1, "splendid": 4}
PROMPTS = ["a cat", "two dogs", "a red car"]
# The strength that a picture says, as drawn on a canvas.
STRENGTH = """image => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}), paint = canvas.getContext('2d');
  paint.drawImage(image, 0, 0);
  return Math.floor(paint.getImageData(0, 0, 1, 1).data[0] / 40);
}"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


class Server:
    """`python jobs/serve_study.py`, which can be killed with all that it started."""

    def __init__(self, folder: Path) -> None:
        for name, strength in MODELS.items():
            drawn.write(f"{folder}/{name}", strength, PROMPTS, side=64)
        drawn.write(f"{folder}/photos", 3, PROMPTS, side=64, field="caption")
        rows = "".join(f"{prompt},c,dots,4\n" for prompt in PROMPTS)
        (folder / "p.csv").write_text("prompt,category,object,number\n" + rows)
        file, port = f"{folder}/p.csv", free_port()
        sets = {
            "main": {"file": file, "questions": ["overall", "appeal", "count"]},
            "photo": {"file": file, "questions": ["detailed"], "references": f"{folder}/photos"},
        }
        study = {"models": {name: f"{folder}/{name}" for name in MODELS}, "sets": sets, "ratings": 3}
        config = {
            "study": {**study, "share": 1.0, "block": 5},
            "serve": {"port": port, "cpus_per_replica": 0.1},
            "run": {"dir": f"{folder}/run"},
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(config))
        self.folder, self.address = folder, f"http://127.0.0.1:{port}/"
        self.store = Store(f"{folder}/run")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "jobs/serve_study.py", str(self.folder / "study.yaml")]
        with (self.folder / "said.txt").open("a") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=said, stderr=said)

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process and self.process.poll() is None, self.said()
            try:
                if requests.get(self.address, timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                time.sleep(0.1)
        raise AssertionError(self.said())

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def kill(self) -> None:
        """kill -9 of the driver, the proxy and the replicas, all at once."""
        if self.process:
            commands.kill(self.process)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("ray.serve")
    server = Server(tmp_path)
    try:
        yield server
    finally:
        server.kill()


def choose(page, keys: bool) -> None:  # type: ignore[no-untyped-def]
    """Answer as a rater who prefers the stronger model, by keys or by touch."""
    text = page.locator("#question").inner_text()
    if page.locator("#number-form").is_visible():
        wanted = text.rstrip(".").rpartition(" ")[2] if "attention" in text else "4"
        page.get_by_label("Number").fill(wanted)
        page.keyboard.press("Enter") if keys else page.get_by_role("button", name="Next").tap()
        return
    left, right = (page.get_by_alt_text(f"{side} image", exact=True).evaluate(STRENGTH) for side in ("Left", "Right"))
    side = text.rstrip(".").rpartition(" ")[2] if "attention" in text else "left" if left > right else "right"
    if keys:
        page.keyboard.press({"left": "1", "right": "ArrowRight"}[side])
    else:
        page.get_by_role("group").get_by_role("button", name=side.capitalize()).tap()


def until(page, holds: str, seconds: float = 30) -> None:  # type: ignore[no-untyped-def]
    """Wait until an expression holds; Playwright's own way to wait evaluates in the page, which its policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, f"{holds}: {page.locator('main').inner_text()}"
        page.wait_for_timeout(20)


def ready(page) -> str:  # type: ignore[no-untyped-def]
    """Wait for the next task; returns "3 of 15", or "done"."""
    until(page, "(task && !busy) || !document.getElementById('done').hidden")
    return "done" if page.locator("#done").is_visible() else str(page.locator("#count").inner_text())


def test_a_rater_completes_a_study_and_nothing_is_lost_or_counted_twice(server: Server) -> None:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    api = pytest.importorskip("playwright.sync_api")
    server.start()
    server.wait()
    token = issue(server.store, 1)[0]
    of = open_plan(server.store)

    def kept() -> int:
        return len(server.store.list("ratings")) + len(server.store.list("checks"))

    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
        page, complaints = context.new_page(), list[str]()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        page.goto(server.address)
        page.get_by_label("Your token").fill(token[:-1] + "~")
        page.get_by_role("button", name="Sign in").tap()
        page.get_by_text("not known").wait_for()
        page.goto(f"{server.address}#token={token}")
        page.reload()  # the fragment alone loads nothing
        assert ready(page) == f"0 of {of.slots}" and "token" not in page.url
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it fits on a phone"
        assert token not in page.evaluate("document.cookie"), "scripts do not see the token"

        # A reload shows the same task, and loses nothing.
        choose(page, keys=False)
        ready(page)
        before, question = page.locator("#count").inner_text(), page.locator("#question").inner_text()
        sources = page.eval_on_selector_all("#rating img", "images => images.map(i => i.src)")
        page.reload()
        assert ready(page) == before and page.locator("#question").inner_text() == question
        assert page.eval_on_selector_all("#rating img", "images => images.map(i => i.src)") == sources
        assert kept() == 1

        # A double click counts once.
        while page.locator("#number-form").is_visible():
            choose(page, keys=True)
            ready(page)
        number = kept()
        page.get_by_role("button", name="indifferent").dblclick()
        time.sleep(0.5)  # for a second answer, were there one
        ready(page)
        assert kept() == number + 1
        # The arrow down scrolls.
        if page.locator("#choices").is_visible():
            page.keyboard.press("ArrowDown")
            time.sleep(0.5)
            ready(page)
            assert kept() == number + 1
        # Who speaks, or rests a hand on the keys, turns them off (WCAG 2.1.4); a reload leaves them off.
        while page.locator("#number-form").is_visible():
            choose(page, keys=True)
            ready(page)
        number, box = kept(), page.get_by_label("Answer by keys")
        box.uncheck()
        page.reload()
        ready(page)
        page.keyboard.press("1")
        page.keyboard.press("ArrowRight")
        time.sleep(0.5)
        ready(page)
        assert kept() == number and not page.locator("[data-answer=right]").get_attribute("aria-keyshortcuts")
        box.check()
        # An image is enlarged and made small by keys, and the focus is then where it was; or by a button that is seen.
        picture = page.get_by_role("button", name="Enlarge: left image")
        picture.focus()
        page.keyboard.press("Enter")
        assert page.get_by_role("dialog").get_by_role("button", name="Close").is_visible()
        page.keyboard.press("Escape")
        assert not page.get_by_role("dialog").is_visible()
        assert picture.evaluate("button => button === document.activeElement")
        picture.tap()
        page.get_by_role("button", name="Close").tap()
        assert not page.get_by_role("dialog").is_visible() and kept() == number
        # The focus stays with the button until the next question has it, and is seen.
        clicked = "button => { button.focus(); button.click(); return button === document.activeElement; }"
        assert page.locator("[data-answer=left]").evaluate(clicked)
        until(page, "!busy")
        page.keyboard.press("Shift")
        focused = "document.activeElement.id + ' ' + getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(focused) in ("question solid", "number solid") and kept() == number + 1
        number = kept()
        # So does the same answer twice at once, from the page's own script.
        id_ = page.evaluate("task.id")
        answer = 4 if page.locator("#number-form").is_visible() else "left"
        page.evaluate(
            "([id, answer]) => Promise.all([1, 2, 3].map(() => call('POST', 'api/rating', {task: id, answer, seconds: 1})))",
            [id_, answer],
        )
        assert kept() == number + 1

        # A second tab shows the same; what both answer counts once.
        page.reload()
        ready(page)
        tab = context.new_page()
        tab.goto(server.address)
        assert ready(tab) == ready(page)
        number = kept()
        choose(page, keys=True)
        until(page, f"task.id !== {tab.evaluate('task.id')!r}")
        choose(tab, keys=False)
        until(tab, "!busy")
        assert kept() == number + 1 and tab.evaluate("task.id") == page.evaluate("task.id")
        tab.close()

        # The server is killed. An answer that is given meanwhile arrives when there is one again, once.
        ready(page)
        server.kill()
        choose(page, keys=True)
        page.get_by_text("The server does not answer").wait_for()
        assert kept() == number + 1
        server.start()
        until(page, "!busy", 120)
        assert kept() == number + 2
        assert [c for c in complaints if "Content Security" in c or "Error:" in c] == []

        while ready(page) != "done":
            current = page.evaluate("task.id")
            choose(page, keys=kept() % 2 == 0)
            until(page, f"!task || task.id !== '{current}'")
        assert page.get_by_role("heading", name="Thank you").is_visible()
        browser.close()
    assert server.process and server.process.wait(60) == 0, server.said()
    rows = pq.read_table(io.BytesIO(server.store.read("preferences/ratings.parquet"))).to_pylist()
    assert sorted(row["slot"] for row in rows) == list(range(of.slots)), "each once"
    assert all(row["counts"] and 0 < row["seconds"] < 120 for row in rows)
    preferred = Counter(row["score"] for row in rows if row["question"] != "count" and row["first"] == "modest")
    assert preferred[0.0] >= of.slots - 3 * 2 - 4, "the stronger one, but for the clicks above"
    checks = ratings.all_of(server.store, True)
    assert len(checks) >= of.slots // of.block
    result = from_json(server.store.read("result.json"))
    assert result["ratings"] == of.slots and result["best"]["main/overall"] == "splendid"
    assert {c.question for c in of.comparisons} == {
        Question.overall,
        Question.appeal,
        Question.count,
        Question.detailed,
    }


def test_without_ray_serve_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delattr(ray, "serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    config = ServeConfig()
    with (
        pytest.raises(UserError, match=r"rayproj\[serve\]"),
        serving("x", config.http, lambda: bound("memory://x", config)),
    ):
        pass


def test_where_raters_come_to_may_change_and_what_they_are_asked_may_not(tmp_path: Path) -> None:
    from rayproj.jobs.serve_study import Config  # type: ignore[attr-defined]

    from rayproj.runtime.run import Run

    words = [f"run.dir={tmp_path}/run", "tracking.wandb=disabled"]
    with Run.open("serve_study", configuration.load(Config, ROOT / "configs" / "serve_study.yaml", words)):
        pass
    other = configuration.load(Config, ROOT / "configs" / "serve_study.yaml", [*words, "serve.port=9000"])
    with Run.open("serve_study", other):
        pass
    other.study.ratings = 7
    with pytest.raises(UserError, match="ratings was 40, now 7"), Run.open("serve_study", other):
        pass


def test_what_is_wrong_with_where_raters_come_to() -> None:
    assert (
        ServeConfig(certificate="c").problems() and ServeConfig(replicas=0).problems() and not ServeConfig().problems()
    )
    everybody = ServeConfig("0.0.0.0")
    assert everybody.open and not ServeConfig().open and not ServeConfig("0.0.0.0", https=True).open
    assert everybody.http == {"host": "0.0.0.0", "port": 8000}
    assert ServeConfig(certificate="c", key="k").secure and not ServeConfig().secure and ServeConfig(https=True).secure
