"""What a browser sends for another site is not taken, however it says so."""

import pytest

from rayproj.web import name_problems, refusal

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
