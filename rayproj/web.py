"""What a server of ours takes from a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

READS = ("GET", "HEAD")


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
    try:
        return bool(ip_address(name))
    except ValueError:
        return False
