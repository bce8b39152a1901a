"""An application on Ray Serve for as long as a block runs, beside whatever else its cluster serves."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from rayproj.errors import UserError
from rayproj.runtime.cluster import connect

ASKED = (
    "host",
    "port",
    "ssl_certfile",
    "ssl_keyfile",
)  # of Serve's HTTP options; there is one set of them for a cluster


@contextmanager
def serving(name: str, http: Mapping[str, Any], build: Callable[[], Any]) -> Iterator[None]:
    """Serve an application at "/" while the block runs, by the head's machine alone.

    Args:
        name: which nothing else on the cluster has; what is left of it from a driver that was killed is replaced.
        http: of `ASKED`, as of `ray.serve.config.HTTPOptions`.
        build: the bound application; it is called where Ray Serve is installed.

    Raises:
        UserError: Ray Serve is not installed, or does not come up; or the cluster serves elsewhere or something else.
    """
    try:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        application = build()
    except ImportError as error:
        raise UserError(f"This needs Ray Serve: pip install 'rayproj[serve]' ({error}).") from error
    if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        _require_port(http)  # of the machine that is about to become the head
    connect()
    _require_same(http)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options=dict(http))
            serve.run(application, name=name, route_prefix="/", logging_config={"enable_access_log": False})
        except (RuntimeError, RayServeException) as error:
            why = str(error).strip().splitlines()[-1].rstrip(".)")  # above it is a traceback
            raise UserError(
                f"Nothing can be served at {http['host']}:{http['port']}: {why}; is the port free?"
            ) from error
        yield
    finally:
        _end(name)


def _running() -> Any:
    """Serve's client, where Serve is up; else None."""
    from ray.serve.context import _get_global_client  # there is no public way to ask for Serve's options

    return _get_global_client(raise_if_no_controller_running=False)


def _require_same(http: Mapping[str, Any]) -> None:
    """That Serve, if it is up, listens as is asked for: to other options it would pay no regard.

    Raises:
        UserError: it listens otherwise.
    """
    if client := _running():
        there = {key: getattr(client.http_config, key) for key in ASKED}
        if differing := [key for key in ASKED if there[key] != http.get(key)]:
            said = ", ".join(f"{key}={there[key]}" for key in differing)
            raise UserError(
                f"Ray Serve is up on this cluster, with {said}, and listens one way for all that it serves; configure the "
                "same, or end what is served there (`serve shutdown`)."
            )


def _require_port(http: Mapping[str, Any]) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http["host"], http["port"]))
        except OSError as error:
            raise UserError(
                f"{http['host']}:{http['port']} cannot be listened to ({error}); give another port."
            ) from error


def _end(name: str) -> None:
    """Take the application down, and Serve with it where that was all."""
    from ray import serve

    if _running():
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()
