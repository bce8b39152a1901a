"""The jobs, which live in the top-level folder `jobs/` of the checkout; the wheel puts the files beside this one."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "jobs"
if _checkout.is_dir():
    __path__.append(str(_checkout))
