"""Which errors pass by themselves: the libraries' own exceptions, a server that is really down, and real files."""

import errno
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
import requests
import urllib3
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError

from rayproj.errors import UserError
from rayproj.storage import retry
from rayproj.storage.retry import StoreUnavailable, persist, transient
from rayproj.storage.store import IntegrityError, Store
from tests.support.s3 import S3Server, answering


@contextmanager
def down(server: S3Server) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextmanager
def down_for(server: S3Server, seconds: float) -> Iterator[None]:
    server.stop()
    timer = threading.Timer(seconds, server.start)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def answered(code: str, status: int) -> boto.ClientError:
    """What botocore makes of a server's answer."""
    return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


REFUSED = aiohttp.ClientConnectorError(
    aiohttp.client_reqrep.ConnectionKey("h", 1, False, True, None, None, None), OSError(errno.ECONNREFUSED, "refused")
)
URL = {"endpoint_url": "http://h"}
PASSES = [
    *(boto.EndpointConnectionError(**URL), boto.ConnectTimeoutError(**URL), boto.ReadTimeoutError(**URL)),
    *(boto.ConnectionClosedError(**URL), boto.HTTPClientError(error="reset"), ResponseParserError("cut off")),
    *(answered("SlowDown", 503), answered("InternalError", 500), answered("OperationAborted", 409)),
    *(answered("TooManyRequests", 429), answered("RequestTimeout", 400), answered("BadDigest", 400)),
    raised_from(OSError(errno.EINVAL, "IncompleteBody"), answered("IncompleteBody", 400)),  # as s3fs raises it
    raised_from(OSError(errno.EBUSY, "SlowDown"), answered("SlowDown", 503)),
    *(REFUSED, aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError(), aiohttp.ClientOSError(104, "reset")),
    *(aiohttp.ServerTimeoutError(), FSTimeoutError(), TimeoutError(), ConnectionResetError()),
    *(requests.ConnectionError(), requests.ReadTimeout(), urllib3.exceptions.ProtocolError("broken")),
    urllib3.exceptions.IncompleteRead(1, 2),
    *(OSError(getattr(errno, code), code) for code in ("EIO", "ESTALE", "ETIMEDOUT", "EHOSTUNREACH", "EREMOTEIO")),
]
STAYS = [
    *(answered("AccessDenied", 403), answered("NoSuchKey", 404), answered("PreconditionFailed", 412)),
    *(answered("InvalidArgument", 400), answered("NotImplemented", 501), answered("ExpiredToken", 400)),
    raised_from(OSError(errno.EIO, "NotImplemented"), answered("NotImplemented", 501)),
    raised_from(PermissionError("Forbidden"), answered("403", 403)),
    *(boto.NoCredentialsError(), boto.ProfileNotFound(profile="x"), boto.ParamValidationError(report="bucket")),
    aiohttp.InvalidURL("x"),
    *(FileNotFoundError(), FileExistsError(), PermissionError(), IsADirectoryError(), NotADirectoryError()),
    *(OSError(getattr(errno, code), code) for code in ("ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG", "EFBIG")),
    *(IntegrityError("hash"), UserError("x"), StoreUnavailable("x"), ValueError("x"), MemoryError()),
]


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_passes_by_itself(error: Exception) -> None:
    assert transient(error)


@pytest.mark.parametrize("error", STAYS, ids=repr)
def test_what_does_not_pass_by_itself(error: Exception) -> None:
    assert not transient(error)


def attempts_of(operation, store: str = "here") -> tuple[list[float], BaseException]:  # type: ignore[no-untyped-def]
    times: list[float] = []

    def attempt() -> None:
        times.append(time.monotonic())
        operation()

    with pytest.raises(Exception) as raised:
        persist(attempt, store)
    return times, raised.value


def test_a_full_disk_is_not_tried_again() -> None:
    """/dev/full is one."""
    times, error = attempts_of(lambda: Path("/dev/full").write_bytes(b"1"))
    assert len(times) == 1 and isinstance(error, OSError) and error.errno == errno.ENOSPC


def test_a_filesystem_with_an_input_output_error_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped at address 0 of a process, and its memory's file says EIO."""
    monkeypatch.setenv("RAYPROJ_STORE_RETRY_SECONDS", "0.5")
    times, error = attempts_of(lambda: Path("/proc/self/mem").open("rb", buffering=0).read(1))
    assert len(times) > 1 and isinstance(error, StoreUnavailable) and "Input/output error" in str(error)


def test_a_server_that_refuses_connections_is_tried_again_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPROJ_STORE_RETRY_SECONDS", "3")
    with socket.socket() as closed:  # bound, and not listening
        closed.bind(("127.0.0.1", 0))
        times, error = attempts_of(lambda: socket.create_connection(closed.getsockname()))
    assert isinstance(error, StoreUnavailable)
    # Pause n lasts between 0 and 0.2 * 2^n seconds: at least five attempts, and far from a busy loop.
    assert 5 <= len(times) <= 40
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert all(pause < 0.2 * 2**n + 0.5 for n, pause in enumerate(pauses))
    assert times[-1] - times[0] >= 3


def test_an_outage_is_waited_out_and_told_once(
    server: S3Server, store: Store, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    store.put_once("before", b"1")
    (tmp_path / "x").write_bytes(b"x")
    for operation in (
        lambda: store.read("before") == b"1",
        lambda: store.put_once("after", b"2"),
        lambda: store.upload(tmp_path / "x", "x").size == 1,
        lambda: store.exists("x") and not store.exists("y"),
    ):
        with down_for(server, 0.7):
            assert operation()
    assert store.list() == ["after", "before", "x"]
    (record,) = caplog.records
    assert re.search(rf"The store {store.uri} does not answer \(.*\); trying again for up to 300", record.getMessage())


def test_a_later_outage_is_told_again(server: S3Server, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for told in (1, 2):
        with down_for(server, 0.4):
            store.exists("a")
        assert len(caplog.records) == told
        retry._last_failure[store.uri.removesuffix("/folder")] -= retry.ONE_OUTAGE + 1


def test_a_store_that_stays_away_is_given_up_after_the_budget(
    server: S3Server, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPROJ_STORE_RETRY_SECONDS", "1")
    began = time.monotonic()
    with down(server):
        for operation in (store.list, lambda: store.write("a", b"1")):
            says = (
                rf"The store {store.uri} did not answer for 1 seconds \(RAYPROJ_STORE_RETRY_SECONDS\); the last error"
            )
            with pytest.raises(StoreUnavailable, match=says):
                operation()
    assert 2 <= time.monotonic() - began < 12
    assert len(caplog.records) == 1
    assert store.list() == []


def test_a_server_that_falls_silent_is_given_up_too(
    server: S3Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the request, and never answers."""
    monkeypatch.setenv("RAYPROJ_STORE_RETRY_SECONDS", "1")
    monkeypatch.setattr("rayproj.storage.store.PATIENCE", 0.5)
    woken = threading.Event()

    def silent(app):  # type: ignore[no-untyped-def]
        def disturbed(environ, start_response):  # type: ignore[no-untyped-def]
            woken.wait(20)
            return app(environ, start_response)

        return disturbed

    began = time.monotonic()
    with server.disturbed(silent), pytest.raises(StoreUnavailable):
        store.write("a", b"1")
    woken.set()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("status", "code"),
    [("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError"), ("429 Too Many", "SlowDown")],
)
def test_a_server_that_is_overburdened_is_tried_again(server: S3Server, store: Store, status: str, code: str) -> None:
    store.write("a", b"1")
    left = iter(range(3))
    with server.disturbed(answering(status, code, lambda environ: next(left, None) is not None)):
        assert store.read("a") == b"1"
    assert next(left, None) is None, "all three were met"


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [("403 Forbidden", "AccessDenied", UserError), ("404 Not Found", "NoSuchKey", FileNotFoundError)],
)
def test_a_refusal_is_not_tried_again(
    server: S3Server, store: Store, status: str, code: str, error: type[Exception]
) -> None:
    requests_: list[str] = []
    refusing = answering(status, code, lambda environ: requests_.append(environ["REQUEST_METHOD"]) or True)
    with server.disturbed(refusing), pytest.raises(error):
        store.read("a")
    assert len(requests_) <= 2  # of one attempt
