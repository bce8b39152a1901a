"""What CheXpert and ChestX-ray14 say alike here, so that a classifier of one can be judged on the other."""

from __future__ import annotations

from collections.abc import Sequence

from rayproj.data.sources.base import SourceConfig
from rayproj.errors import UserError

SEXES = {"M": "male", "F": "female", "Male": "male", "Female": "female"}
OLDEST = 120  # years; beyond is a mistake


def target(config: SourceConfig, findings: Sequence[str]) -> str:
    """The finding that is the label.

    Raises:
        UserError: it is none of the source's.
    """
    if config.label_column not in findings:
        raise UserError(
            f"source.label_column='{config.label_column}' must name the finding that is the label: one of "
            f"{', '.join(findings)}."
        )
    return config.label_column


def classes(finding: str) -> tuple[str, str]:
    return f"no {finding}", finding


def age_group(age: str) -> str:
    """Of years, as "58", "58.0" or "058Y": 0-19, 20-39, 40-59, 60-79, 80+, or "" if they are not known."""
    text = age.rstrip("Yy")
    years = int(float(text)) if text.replace(".", "", 1).isdigit() else OLDEST + 1
    if years > OLDEST:
        return ""
    return "80+" if years >= 80 else f"{years // 20 * 20}-{years // 20 * 20 + 19}"
