"""What a server of ours takes from a browser."""

from __future__ import annotations

from collections.abc import Mapping


def refusal(headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Why what was sent is not taken, as a status of HTTP and a sentence; None if it is.

    A page of another site can have its visitor's browser send forms and plain text anywhere, so also to a server that
    listens on the visitor's machine alone; JSON it cannot send without being asked for leave, which we never give.

    Args:
        headers: of a request that changes or costs something, by their names in small letters.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:  # of an older browser, or where there is no https (a proxy is to hand Host on); programs send neither
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
    if foreign:
        return 403, "Another site sent this; ask from this server's own page, or by a program."
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "JSON is wanted; send it with Content-Type: application/json."
    return None
