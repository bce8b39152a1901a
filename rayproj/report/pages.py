"""Pages that need no other file: a template beside this module with its values, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from rayproj.data.encodings import ENCODINGS


def rendered(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """One of the templates with its values.

    Args:
        filters: of the template, besides those of jinja.
    """
    from jinja2 import Environment, FunctionLoader

    def read(name: str) -> str:
        return files("rayproj.report").joinpath(name).read_text(encoding="utf-8")

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read))
    environment.filters |= filters or {}
    return environment.get_template(template).render(values)


def data_uri(data: bytes, kind: str) -> str:
    """An image of a kind such as png, jpeg or svg+xml, as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(image: np.ndarray) -> str:
    """A uint8 image [C, H, W], as an address."""
    return data_uri(ENCODINGS["png"].encode(image), "png")
