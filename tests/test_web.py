"""What a browser sends for another site is not taken, however it says so."""

import asyncio
import json
from typing import Any

import pytest

from rayproj.web import Guarded, asker, name_problems, own, refusal

JSON = {"content-type": "application/json; charset=utf-8", "host": "127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, None),
        ({"sec-fetch-site": "same-origin"}, None),
        ({"sec-fetch-site": "none"}, None),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, None),
        ({"origin": "http://127.0.0.1:8001"}, 403),
        ({"origin": "https://example.org"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "https://study.example", "sec-fetch-site": "same-origin"}, None),  # a proxy may have changed Host
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
    ],
)
def test_other_sites_and_other_forms_are_refused(headers: dict[str, str], status: int | None) -> None:
    found = refusal("POST", {**JSON, **headers}, [])
    assert (found and found[0]) == status
    assert refusal("POST", {"host": "localhost"}, []) is not None, "no form is told"
    assert refusal("GET", {**JSON, **headers}, []) is None, "other sites may link here"


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("localhost:8000", True),
        ("LocalHost", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.0.2.7", True),  # an address: no name that could be turned
        ("study.example", True),
        ("Study.Example:443", True),
        ("study.example.", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("evil-study.example", False),
        ("127.0.0.1.evil.example", False),
        ("[::1", False),
        ("0.0.0.0.0", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_a_name_turned_to_this_server_is_refused(method: str, host: str, taken: bool) -> None:
    """DNS rebinding: to the browser page and server are then one site, `Sec-Fetch-Site: same-origin`."""
    headers = {**JSON, "host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    found = refusal(method, headers, ["0.0.0.0", "Study.example"])
    assert (found is None) == taken
    if not taken:
        assert found == (
            421,
            "This server has no such name; come by its address, or list the name as hosts in its config.",
        )
    else:
        assert refusal(method, headers, []) is None or "study" in host.lower(), "a name is to be listed"


def test_names_that_no_host_can_have_are_said() -> None:
    assert not name_problems(["study.example", "Study.Example", "127.0.0.1"], "serve.hosts")
    for wrong in ("study.example:8000", "https://study.example", "study.example.", "study.example/path"):
        assert f"serve.hosts: '{wrong}' is no name of a machine" in name_problems([wrong], "serve.hosts")[0]


@pytest.mark.parametrize(
    ("address", "this", "counted"),
    [
        ("127.0.0.1", True, ""),
        ("127.3.2.1", True, ""),
        ("::1", True, ""),
        ("::ffff:127.0.0.1", True, ""),
        ("localhost", True, ""),
        ("192.0.2.7", False, "192.0.2.7"),
        ("::ffff:192.0.2.7", False, "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", False, "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", False, "2001:db8:1:2::/64"),
        ("0.0.0.0", False, "0.0.0.0"),
        ("study.example", False, ""),
    ],
)
def test_this_machine_is_told_from_others_and_whose_requests_are_whose(address: str, this: bool, counted: str) -> None:
    assert own(address) == this and asker(address) == counted


def answer_of(app: Any, method: str, parts: tuple[bytes, ...], **headers: str) -> tuple[int, dict[str, str], bytes]:
    """What an application behind the guard answers, over ASGI without a server."""
    given = {"host": "localhost", **({"content-type": "application/json"} if parts else {}), **headers}
    scope = {"type": "http", "method": method, "headers": [(n.encode(), v.encode()) for n, v in given.items()]}
    bodies = list(parts) or [b""]
    messages = [{"type": "http.request", "body": b, "more_body": i < len(bodies) - 1} for i, b in enumerate(bodies)]
    said: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(Guarded(app, [], "img-src data:", 4096)(scope, receive, send))
    start, body = said[0], b"".join(message["body"] for message in said[1:])
    return start["status"], {n.decode(): v.decode() for n, v in start["headers"]}, body


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": message["body"]})


async def fails(scope: Any, receive: Any, send: Any) -> None:
    raise KeyError("a path, or a secret")


def test_every_answer_has_the_headers_also_where_the_application_fails() -> None:
    for app, method, parts, headers, status in (
        (echo, "GET", (), {}, 200),
        (echo, "POST", (b"ab", b"", b"c"), {}, 200),
        (echo, "POST", (b"x" * 4096,), {}, 200),
        (echo, "POST", (b"x" * 4000, b"x" * 97), {}, 413),
        (echo, "GET", (), {"host": "evil.example"}, 421),
        (echo, "OPTIONS", (), {"host": "evil.example"}, 421),
        (echo, "POST", (b"{}",), {"origin": "https://evil.example"}, 403),
        (fails, "GET", (), {}, 500),
        (fails, "HEAD", (), {}, 500),
    ):
        got, heard, body = answer_of(app, method, parts, **headers)
        assert got == status
        policy = heard["content-security-policy"]
        assert policy.startswith("default-src 'none'; img-src data:;") and policy.endswith("frame-ancestors 'none'")
        assert "base-uri 'none'" in policy and "form-action 'self'" in policy
        assert heard["x-content-type-options"] == "nosniff" and heard["cache-control"] == "no-store"
        if status == 200:
            assert body == b"".join(parts) and heard["x-own"] == "1", "as it was sent"
        else:
            assert b"secret" not in body and (method == "HEAD") == (body == b"")
            assert method == "HEAD" or json.loads(body)["error"]
