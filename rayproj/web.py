"""What a server of ours takes from a browser, and how it answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

READS = ("GET", "HEAD")
_log = logging.getLogger("rayproj")


class Guarded:
    """An ASGI application whose every answer has some headers, also those that are none of its own: to what comes by a name
    that is not among `hosts`, to what other sites send, to bodies that are too large, and to what it fails at.

    Args:
        hosts: as names of `refusal`.
        policy: sources of a content security policy, besides "default-src 'none'".
        largest: bytes of a body.
    """

    def __init__(self, app: Any, hosts: Sequence[str], policy: str, largest: int) -> None:
        self.app, self.hosts, self.largest = app, hosts, largest
        headers = {
            "Content-Security-Policy": f"default-src 'none'; {policy}; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = False

        async def with_headers(message: Any) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began, message = True, {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        async def refuse(status: int, sentence: str) -> None:
            body = json.dumps({"error": sentence, "where": ""}).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await with_headers({"type": "http.response.start", "status": status, "headers": kind})
            await with_headers({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        if wrong := refusal(scope["method"], given, self.hosts):
            return await refuse(*wrong)
        body, more = b"", True
        while more and len(body) <= self.largest:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > self.largest:
            return await refuse(413, f"The request is larger than {self.largest // 1024} KiB; shorten it.")
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return left.pop() if left else await receive()

        try:
            await self.app(scope, again, with_headers)
        except Exception:
            if began:
                raise
            _log.exception("a request failed")
            await refuse(500, "The request failed here; try again, and look into the server's log.")


def refusal(method: str, headers: Mapping[str, str], names: Sequence[str]) -> tuple[int, str] | None:
    """Why a request is not taken, as a status of HTTP and a sentence; None if it is.

    A page of another site can have its visitor's browser send forms and plain text anywhere, so also to a server that
    listens on the visitor's machine alone; JSON it cannot send without being asked for leave, which we never give. Nor may
    it come as if from here, its own name having been turned to this server's address (DNS rebinding): the browser still says
    that name as Host.

    Args:
        headers: by their names in small letters.
        names: by which the server is reached, besides localhost and addresses, which cannot be turned elsewhere.
    """
    host = headers.get("host", "")
    if not _known(host, names):
        return 421, "This server has no such name; come by its address, or list the name as hosts in its config."
    if method in READS:
        return None
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:  # of an older browser, or where there is no https (a proxy is to hand Host on); programs send neither
        foreign = origin is not None and origin.partition("://")[2] != host
    if foreign:
        return 403, "Another site sent this; ask from this server's own page, or by a program."
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "JSON is wanted; send it with Content-Type: application/json."
    return None


def name_problems(hosts: Sequence[str], key: str) -> list[str]:
    """What is wrong with names that a config lists."""
    return [
        f"{key}: '{name}' is no name of a machine; give it without scheme, port and path."
        for name in hosts
        if _name(name) != name.lower()
    ]


def own(host: str) -> bool:
    """Whether nobody but this machine listens or asks there: an address of its loopback, or localhost."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def asker(address: str) -> str:
    """Whom to count the requests from an address for: "" for this machine itself, as where a proxy hands on those of many;
    else the address, of IPv6 the network of 64 bits that one subscriber has."""
    found = _address(address)
    if found is None or own(address):
        return ""
    return str(ip_network((int(found), 64), strict=False) if isinstance(found, IPv6Address) else found)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found  # as a socket for both kinds says those of IPv4


def _name(host: str) -> str:
    """Of a Host header, without the port; "" where it has none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # a bracket that is not closed
        return ""


def _known(host: str, names: Sequence[str]) -> bool:
    name = _name(host)
    if name == "localhost" or name in [known.lower() for known in names]:
        return True
    return _address(name) is not None
