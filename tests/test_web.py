"""What a browser sends for another site is not taken, however it says so."""

import pytest

from rayproj.web import refusal

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
    found = refusal({**JSON, **headers})
    assert (found and found[0]) == status
    assert refusal({"host": "x"}) is not None, "no form is told"
