"""Which errors of a store pass by themselves, and trying again until they have."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, wait_random_exponential

from rayproj.errors import UserError

RETRY_SECONDS = 300.0  # how long an outage may last; the environment variable RAYPROJ_STORE_RETRY_SECONDS overrides it
ONE_OUTAGE = 60.0  # failures that are fewer seconds apart are one outage, which is told once

# Those of a network filesystem whose server restarts. A full disk is not among them.
TRANSIENT_ERRNOS = {
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
}
# By name, because the libraries that raise them are only there where they are needed: botocore's, aiohttp's, requests',
# urllib3's and Azure's. None of them is a builtin's subclass.
TRANSIENT_TYPES = {
    *("HTTPClientError", "ConnectionError", "ResponseParserError"),
    *("ClientConnectionError", "ClientPayloadError"),
    *("Timeout", "ProtocolError", "IncompleteRead", "ServiceRequestError", "ServiceResponseError"),
}
TRANSIENT_STATUS = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
# S3 says 400 to a transfer that stalled or arrived damaged, too.
TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
# Credentials for a time, which are over. To a HEAD request, whose answer has no body, S3 says 400 and no more.
EXPIRED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "400"}
CREDENTIAL_TYPES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}

_log = logging.getLogger("rayproj")
_last_failure: dict[str, float] = {}

Result = TypeVar("Result")


class StoreUnavailable(RuntimeError):
    """A store did not answer for as long as we were willing to try."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def http_status(error: BaseException) -> int | None:
    """The status that a server answered with, where the error comes from an answer."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)  # botocore's
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for status in (
            metadata.get("HTTPStatusCode"),
            *(getattr(cause, n, 0) for n in ("status", "status_code", "code")),
        ):
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return None


def _code(error: BaseException) -> str | None:
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code")
    return None


def _types(error: BaseException) -> set[str]:
    return {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}


def transient(error: BaseException) -> bool:
    """Whether the same may succeed a little later."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    status = http_status(error)
    if status is not None:  # what the server said counts more than the errno it was translated to
        return status in TRANSIENT_STATUS or _code(error) in TRANSIENT_CODES
    if isinstance(error, ConnectionError | TimeoutError) or _types(error) & TRANSIENT_TYPES:
        return True
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS


def _users(error: BaseException, store: str) -> UserError | None:
    """What the user can put right."""
    if _code(error) == "NoSuchBucket":
        return UserError(f"There is no such bucket: {store}; create it, or correct the address.")
    if _types(error) & CREDENTIAL_TYPES:
        return UserError(
            f"There are no usable credentials for {store} ({error}); set AWS_PROFILE or AWS_ACCESS_KEY_ID."
        )
    if _code(error) in EXPIRED_CODES:
        return UserError(
            f"{store} refuses the request ({error}); renew the credentials, or correct AWS_DEFAULT_REGION."
        )
    if isinstance(error, PermissionError):
        return UserError(
            f"{store} may not be used ({error}); correct the credentials, or who may read and write there."
        )
    if "ParamValidationError" in _types(error):
        return UserError(f"{store} is no address of a store ({' '.join(str(error).split())}); correct it.")
    return None


def persist(operation: Callable[[], Result], store: str) -> Result:
    """What an operation returns, trying again with growing pauses for as long as its errors are transient.

    Args:
        operation: may be begun anew after any transient error.
        store: its address, for messages.

    Raises:
        StoreUnavailable: transient errors for longer than the budget.
        UserError: there is no such bucket, or no permission.
        Exception: whatever else the operation raises.
    """
    budget = float(os.environ.get("RAYPROJ_STORE_RETRY_SECONDS", RETRY_SECONDS))
    began: list[float] = []  # counted from the first failure: an operation may well take longer than an outage

    def spent(_: RetryCallState) -> bool:
        began.append(time.monotonic())
        return began[-1] - began[0] >= budget

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        place, now = "/".join(store.split("/")[:3]), time.monotonic()
        if now - _last_failure.get(place, -ONE_OUTAGE - now) > ONE_OUTAGE:
            error = state.outcome.exception()
            _log.warning(
                "The store %s does not answer (%s: %s); trying again for up to %g seconds.",
                *(store, type(error).__name__, error, budget),
            )
        _last_failure[place] = now

    attempts = Retrying(
        retry=retry_if_exception(transient),
        wait=wait_random_exponential(multiplier=0.2, max=15),
        stop=spent,
        before_sleep=tell,
    )
    try:
        return attempts(operation)
    except RetryError as failure:
        error = failure.last_attempt.exception()
        raise StoreUnavailable(
            f"The store {store} did not answer for {budget:g} seconds (RAYPROJ_STORE_RETRY_SECONDS); "
            f"the last error was {type(error).__name__}: {error}"
        ) from error
    except Exception as error:
        if (found := _users(error, store)) is not None:
            raise found from error
        raise
