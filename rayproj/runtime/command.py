"""What every job script is on the command line: `python jobs/NAME.py CONFIG.yaml key=value ...`."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rayproj import config as configuration
from rayproj.errors import Interrupted, UserError
from rayproj.runtime import interrupt
from rayproj.storage.store import Store
from rayproj.tracking.progress import display

T = TypeVar("T")


def command(schema: type[T], main: Callable[[T], dict[str, Any]], argv: list[str] | None = None) -> int:
    """Parse the command line, run the job, and turn how it ended into an exit code.

    Returns:
        0 done, or stopped after a commit; 2 for what the user can put right; 1 for anything else.
    """
    parser = argparse.ArgumentParser(description=(sys.modules[main.__module__].__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the file")
    arguments = parser.parse_args(argv)
    return run_guarded(lambda: configuration.load(schema, arguments.config, arguments.overrides), main)


def run_guarded(load: Callable[[], T], main: Callable[[T], dict[str, Any]]) -> int:
    """Run `main(load())` on a Ray cluster; exit code as in `command`."""
    interrupt.listen()
    config = None
    try:
        config = load()
        from rayproj.runtime.cluster import connect

        connect()
        interrupt.listen()  # again: Ray puts its own handler of SIGTERM in
        with display():
            main(config)
        return 0
    except Interrupted:
        again = " ".join(map(shlex.quote, [Path(sys.executable).name, *sys.argv]))
        if Path(sys.argv[0]).name == "rayproj":
            again = " ".join(map(shlex.quote, ["rayproj", *sys.argv[1:]]))
        print(f"Stopped; everything is committed. To go on: {again}", file=sys.stderr)
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return _failed(config, error)
        print(f"error: There is no space left ({error}); free some, and run the same command again.", file=sys.stderr)
        return 2
    except UserError as error:
        if config is not None and error.__cause__ is not None:
            _log(config)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        return _failed(config, error)


def _failed(config: Any, error: Exception) -> int:
    print(f"error: {type(error).__name__}: {error}{_log(config)}", file=sys.stderr)
    return 1


def _log(config: Any) -> str:
    """Keep the traceback of the error in hand beside the run; returns where, to be said."""
    root = getattr(getattr(config, "run", None), "dir", None) or getattr(config, "root", None)
    folder = Store(root).local_path() if root else None
    if folder is None:
        traceback.print_exc()
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as file:
        file.write(traceback.format_exc() + "\n")
    return f" (traceback in {folder / 'log.txt'})"
