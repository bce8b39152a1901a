"""Ctrl-C and SIGTERM, once: a process-wide wish to stop that the supervisor's loops look at."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from rayproj.errors import Interrupted

_wish = threading.Event()


def listen() -> None:
    """Take over SIGINT and SIGTERM: the first asks to stop after a commit, the second leaves at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _wish.is_set():
        print("Leaving at once; the last commit is good.", file=sys.stderr, flush=True)
        os._exit(128 + number)
    _wish.set()
    print("Stopping after a commit; once more to leave at once.", file=sys.stderr, flush=True)


def request() -> None:
    """Ask this process's loops to stop, as the first Ctrl-C does."""
    _wish.set()


def forget() -> None:
    """Begin a piece of work in a process in which one before was to stop."""
    _wish.clear()


def requested() -> bool:
    return _wish.is_set()


def check() -> None:
    """Raise Interrupted if a stop was asked for."""
    if _wish.is_set():
        raise Interrupted
