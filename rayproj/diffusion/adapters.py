"""Low-rank adapters (Hu et al. 2022, "LoRA", section 4.1) for a network's layers, by peft."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from rayproj.diffusion.others import planned
from rayproj.engine.task import pattern_problems
from rayproj.errors import UserError


@dataclass
class LoraConfig:
    """What is trained instead of the network's own weights: W stays, and W + alpha / rank B A takes its place."""

    rank: int = 0  # of B A; 0: no adapters
    alpha: int = 0  # 0: the rank
    layers: str = r"\.to_(q|k|v|out\.0)$"  # regular expression, found in the names of the layers that have adapters

    def problems(self) -> list[str]:
        found = pattern_problems(self.layers, "lora.layers")
        return found + [f"lora.{n} must not be negative." for n in ("rank", "alpha") if getattr(self, n) < 0]


def adapt(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Give the model adapters, in place, and freeze all else. At first they change nothing: B is zero.

    Raises:
        UserError: peft is not there, or no layer has such a name.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise UserError("diffusion.lora needs peft; pip install 'rayproj[lora]'.") from error
    kinds = nn.Linear | nn.Conv2d | nn.Embedding
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) and re.search(config.layers, n)]
    if not names:
        raise UserError(
            f"diffusion.lora.layers='{config.layers}' is found in the name of no Linear, Conv2d or Embedding; there are "
            + ", ".join([n for n, m in model.named_modules() if isinstance(m, kinds)][:6])
            + ", ..."
        )
    torch.manual_seed(seed)
    asked = PeftConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=names)
    with _where_they_are() if planned() else nullcontext():
        inject_adapter_in_model(asked, model)


@contextmanager
def _where_they_are() -> Iterator[None]:
    """Modules stay on their device: torch cannot move parameters without contents, not even to where they are."""
    to = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


def merge(model: nn.Module) -> None:
    """Make the adapters part of the weights they stand beside, and the model what it was before `adapt`, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # type: ignore[operator]
            model.set_submodule(name, module.get_base_layer())
