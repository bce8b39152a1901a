"""Measure ours against peers, interleaved in one run; print a table and keep it as JSON.

python jobs/benchmark.py NAME [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from rayproj.errors import UserError
from rayproj.report.build import environment
from rayproj.storage.store import to_json

BENCHMARKS = (
    "diffusion",
    "discovery",
    "epinet",
    "kernels",
    "obfuscation",
    "privacy",
    "robustness",
    "runtime",
    "serving",
    "skewsize",
    "synthesis",
    "testbed",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure ours against peers.")
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--out", type=Path, help="keep the result here")
    arguments = parser.parse_args(argv)
    try:
        rows = importlib.import_module(f"rayproj.benchmarks.{arguments.name}").measure()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    width = max(len(row["metric"]) for row in rows)
    print(f"{'metric':<{width}}  {'unit':<6} {'ours':>10} {'peer':>10}  {'ratio':>6}  {'goal':>5}  peer is")
    for row in rows:
        goal = "" if row["goal"] is None else f"{'<' if row['better'] == 'lower' else '>'}{row['goal']:g}"
        print(
            f"{row['metric']:<{width}}  {row['unit']:<6} {row['ours']:>10.4g} {row['peer_value']:>10.4g}  "
            f"{row['ratio']:>6.3f}  {goal:>5}  {row['peer']}"
        )
    if arguments.out:
        command = " ".join(["python", *map(shlex.quote, sys.argv)])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_bytes(to_json({"rows": rows, "environment": {**environment(), "command": command}}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
