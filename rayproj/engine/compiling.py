"""`torch.compile` of what a model repeats."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from torch import nn

from rayproj.errors import UserError


def need_compiler(option: str) -> None:
    """Raise UserError where there is no C++ compiler, which torch needs on CPU, and Triton on a GPU too."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError(f"{option}=true needs a C++ compiler; install g++, or leave it off.")


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself: a model's blocks are alike, so that one costs less than the whole, and what lies
    between them may be anything."""
    for block in _blocks(model):
        block.compile()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
