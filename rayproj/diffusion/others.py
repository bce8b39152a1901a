"""Networks of diffusers from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rayproj.errors import UserError


def config_of(folder: str, said_as: str) -> dict[str, Any]:
    """The config.json of a network.

    Args:
        said_as: the name of the setting, for the message.

    Raises:
        UserError: there is none.
    """
    try:
        found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{said_as}='{folder}' holds no network of diffusers ({error}).") from error
    return found


def load(kind: Any, folder: str, said_as: str) -> Any:
    """The network with its weights; without them where memory is planned, for which its size is enough."""
    if planned():
        return kind.from_config(config_of(folder, said_as))
    return kind.from_pretrained(folder, local_files_only=True)


def planned() -> bool:
    """Whether tensors have no contents now."""
    return isinstance(torch.empty(0), FakeTensor)
