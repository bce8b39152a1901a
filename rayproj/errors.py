"""The errors that carry meaning across layers. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right. The message is one clear sentence with the remedy.

    The command line prints it without a traceback (which goes to the log) and exits with code 2.
    """


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite. Retrying would give the same, so no retry budget covers it."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has committed what it had."""
