"""Two applications on one cluster, and Serve's one set of HTTP options."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import requests

from rayproj.errors import UserError
from rayproj.runtime.serving import serving

pytest.importorskip("fastapi", reason="Ray Serve needs the extra serve")
pytest.importorskip("ray.serve", reason="Ray Serve needs the extra serve")


def saying(word: str) -> Callable[[], Any]:
    def build() -> Any:
        from fastapi import FastAPI
        from ray import serve

        app = FastAPI()

        @app.get("/")
        def say() -> str:
            return word

        return (
            serve.deployment(serve.ingress(app)(type("Says", (), {}))).options(ray_actor_options={"num_cpus": 0}).bind()
        )

    return build


def test_what_others_serve_on_a_cluster_is_left_as_it_is(cluster: None) -> None:
    from ray.serve.context import _get_global_client

    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            ports.append(listening.getsockname()[1])
    http = {"host": "127.0.0.1", "port": ports[0]}
    with serving("one", http, saying("one")):
        url = f"http://127.0.0.1:{ports[0]}/"
        assert requests.get(url).json() == "one"
        for other, says in (
            ({"port": ports[1]}, rf"is up on this cluster, with port={ports[0]}, and listens one way for all"),
            ({"host": "0.0.0.0"}, r"with host=127\.0\.0\.1"),
            ({"ssl_certfile": "c", "ssl_keyfile": "k"}, r"with ssl_certfile=None, ssl_keyfile=None"),
            ({}, 'Prefix / is being used by application "one"'),
        ):
            with pytest.raises(UserError, match=says), serving("two", {**http, **other}, saying("two")):
                pass
            assert requests.get(url).json() == "one", "still"
        with serving("one", http, saying("another")):  # of a driver that took the run up again
            assert requests.get(url).json() == "another"
    assert _get_global_client(raise_if_no_controller_running=False) is None, "nothing was left to serve"
