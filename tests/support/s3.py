"""An S3 server of our own, over HTTP: moto's, with means to disturb it."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

App = Callable[[dict, Callable], Iterable[bytes]]
"""A WSGI application. A disturbance is a function from one to another."""


class QuietHandler(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class S3Server:
    """Serves buckets of this process's memory; they outlive `stop` and `start`, as does the port.

    Attributes:
        env: what a user would set to work with it.
    """

    def __init__(self) -> None:
        self._moto, self._writing = DomainDispatcherApplication(create_backend_app), Lock()
        self._disturbed: App = self._serve
        self._server: BaseWSGIServer | None = None
        self.start()
        self.port = self._server.port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def start(self) -> None:
        """Serve, on the same port as before."""
        port = 0 if self._server is None else self.port
        self._server = make_server(
            "127.0.0.1", port, lambda e, s: self._disturbed(e, s), threaded=True, request_handler=QuietHandler
        )
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def disturbed(self, disturbance: Callable[[App], App]) -> Iterator[None]:
        """Requests go through a WSGI middleware."""
        self._disturbed = disturbance(self._serve)
        try:
            yield
        finally:
            self._disturbed = self._serve

    def bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"bucket-{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A client that is not fsspec's, to look behind its back."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def _serve(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._moto(environ, start_response)
        with self._writing:  # moto looks whether a key exists and then writes it; S3 does both at once
            return list(self._moto(environ, start_response))


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running server, with this process's environment (which subprocesses inherit) pointing to it."""
    server = S3Server()
    S3FileSystem.clear_instance_cache()  # instances remember the environment they were made in
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            yield server
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()


def take_body(environ: dict) -> bytes:
    return environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def breaking(first: int, only: str = "PUT", after: bool = False) -> Callable[[App], App]:
    """The first requests of a method get no answer, their connection breaks; `after` they were carried out, or before."""
    left, lock = [first], Lock()

    def disturbance(app: App) -> App:
        def disturbed(environ: dict, start_response: Callable) -> Iterable[bytes]:
            with lock:
                broken = environ["REQUEST_METHOD"] == only and left[0] > 0
                left[0] -= broken
            if broken and not after:
                take_body(environ)
            answer = app(environ, start_response) if after or not broken else []
            if broken:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return []
            return answer

        return disturbed

    return disturbance


def answering(status: str, code: str, when: Callable[[dict], bool]) -> Callable[[App], App]:
    """Requests for which `when(environ)` are not carried out but answered with an error."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'

    def disturbance(app: App) -> App:
        def disturbed(environ: dict, start_response: Callable) -> Iterable[bytes]:
            if not when(environ):
                return app(environ, start_response)
            take_body(environ)
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body.encode()]

        return disturbed

    return disturbance
