"""Load on a real server of one request at a time, whose latencies are known."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from rayproj import cli
from rayproj.errors import UserError
from rayproj.responsibility.load import Load, measure

SECONDS = 0.03


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Takes 30 ms a request, one after another; refuses where more than three wait."""
    loop, ready, address = asyncio.new_event_loop(), threading.Event(), []

    async def serve() -> None:
        one, waiting = asyncio.Lock(), [0]

        async def images(request: web.Request) -> web.Response:
            if waiting[0] >= 3:
                return web.json_response({"error": "full"}, status=503, headers={"Retry-After": "0"})
            waiting[0] += 1
            async with one:
                await asyncio.sleep(SECONDS)
            waiting[0] -= 1
            return web.json_response({"images": [{"png": "x"}, {"png": None}]})

        async def health(request: web.Request) -> web.Response:
            return web.json_response({"status": "ok", "model_commit": "c0ffee"})

        app = web.Application()

        async def others(request: web.Request) -> web.Response:
            return web.Response(text=request.match_info["says"], content_type="application/json")

        app.add_routes([web.post("/images", images), web.get("/health", health), web.get("/{says}/health", others)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(serve()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield address[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_latencies_and_throughput_of_a_known_server(server: str) -> None:
    alone = measure(server, users=1, seconds=10, requests=10)
    assert alone.answers == {"200": 10} and alone.images == 10, "an image that was withheld is none"
    assert 0.7 / SECONDS / 2 < alone.images_per_second < 1 / SECONDS
    assert SECONDS <= alone.percentile(50) < 3 * SECONDS
    three = measure(server, users=3, seconds=0.5)
    assert 2 * SECONDS < three.percentile(50) < 6 * SECONDS, "each waits for the two others"
    assert 0.5 <= three.seconds < 2 and three.images == three.answers["200"]
    crowd = measure(server, users=8, seconds=0.3)
    assert crowd.answers["503"] > 0 and crowd.images == crowd.answers["200"]


def test_percentiles_are_of_what_was_measured() -> None:
    load = Load(1, 10.0, [float(i) for i in range(1, 101)], 100)
    assert [load.percentile(p) for p in (50, 95, 99)] == [50, 95, 99] and load.images_per_second == 10
    said = load.described()
    assert said["latency"] == {"p50": 50, "p95": 95, "p99": 99} and said["images_per_second"] == 10
    assert "latencies" not in said and Load(1).described()["latency"] == {"p50": None, "p95": None, "p99": None}


def test_what_was_measured_is_kept_in_a_file(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    assert cli.main(["playground", "load", server, "--users", "2", "--seconds", "0.2", "--to", str(file)]) == 0
    kept = Load.read(str(file))
    assert (
        kept.users == 2 and kept.model_commit == "c0ffee" and kept.images == kept.answers["200"] == len(kept.latencies)
    )
    assert str(kept) == capsys.readouterr().out.strip(), "what is read is what was said"
    with pytest.raises(UserError, match="cannot be written"):
        kept.write(f"{tmp_path}/none/load.json")
    for name, text in {"missing": None, "broken": "{", "other": '{"answers": {}, "a": 1}', "list": "[1]"}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="is no file of 'rayproj playground load"):
            Load.read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://example.org", "not on this machine"),
        ("http://127.0.0.1.example.org", "not on this machine"),
        ("http://127.0.0.1:9", "No playground answers"),
    ],
)
def test_where_no_load_is_put(url: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        measure(url, 1, 1.0)


@pytest.mark.parametrize("says", ["[]", "1", "no json"])
def test_another_server_is_no_playground(server: str, says: str) -> None:
    with pytest.raises(UserError, match="No playground answers"):
        measure(server + says, 1, 1.0)
