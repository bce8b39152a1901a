"""What an image is drawn of: a class, properties, a text, a smaller image. Each may be missing, for a row or for all.

A condition is a dict of tensors by name, rows first: int64 [B] numbers of a class or of a property's value, -1 for none;
"text", fp32 [B, T, D], embeddings of a text's tokens, zeros past its end, all zeros for none; "low", fp32 [B, C, H, W], an
image in about [-1, 1] with noise of the level "low_noise", fp32 [B], zeros for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from rayproj import keyed
from rayproj.data.dataset import Header
from rayproj.engine.task import Batch
from rayproj.errors import UserError

Condition = dict[str, Tensor]
TEXT, LABEL, LOW, LOW_NOISE = "text", "label", "low", "low_noise"


LEVELS = 32  # sines and cosines of a level of noise


@dataclass
class ConditionConfig:
    """How a condition is learned."""

    dropout: float = 0.1  # share of examples trained without it, for guidance
    # Of "text": the fields it is drawn from, and how often each.
    captions: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0  # of "low": the largest level of the noise that it is given (Ho et al. 2022, section 3.2)

    def problems(self) -> list[str]:
        found = [
            f"conditions: {name} must lie in [0, 1], not {getattr(self, name):g}."
            for name in ("dropout", "noise")
            if not 0 <= getattr(self, name) <= 1
        ]
        return (
            found
            if all(w > 0 for w in self.captions.values())
            else [*found, "conditions: captions have shares above 0."]
        )


@dataclass(frozen=True)
class Conditions:
    """The conditions of a model.

    Attributes:
        values: how many values a class or property has.
        text: [T, D] of the tokens, or nothing.
        low: [C, H, W] of the smaller image, or nothing.
    """

    values: dict[str, int]
    text: tuple[int, ...] = ()
    low: tuple[int, ...] = ()

    @classmethod
    def of(cls, configs: dict[str, ConditionConfig], latents: Header) -> Conditions:
        """Those of the config, as the latents have them.

        Raises:
            UserError: they have not.
        """
        values, text = dict[str, int](), set[tuple[int, ...]]()
        low: tuple[int, ...] = ()
        for name, config in configs.items():
            for source in [f"{TEXT}_{caption}" for caption in config.captions] if name == TEXT else [name]:
                if source not in latents.fields:
                    remedy = {TEXT: "text.captions", LOW: "a low"}.get(name, "properties")
                    raise UserError(
                        f"diffusion.conditions.{name}: the latents have no field '{source}'; they have "
                        f"{', '.join(sorted(latents.fields))}. Encode them with {remedy} that name it."
                    )
                if name == TEXT:
                    text.add(latents.fields[source].shape)
                elif name == LOW:
                    low = latents.fields[LOW].shape
                elif not (values := values | {name: len(latents.values_of(name))})[name]:
                    raise UserError(
                        f"diffusion.conditions.{name}: the values of '{name}' are not known; encode the latents with "
                        f"properties.{name}=[...], the list of them."
                    )
        if TEXT in configs and len(text) != 1:
            raise UserError("diffusion.conditions.text.captions must name at least one caption, all of one encoder.")
        return cls(values, text.pop() if text else (), low)

    def nothing(self, rows: int, device: torch.device | str = "cpu") -> Condition:
        """No condition at all."""
        found = {name: torch.full((rows,), -1, device=device) for name in self.values}
        if self.text:
            found[TEXT] = torch.zeros(rows, *self.text, device=device)
        if self.low:
            found |= {LOW: torch.zeros(rows, *self.low, device=device), LOW_NOISE: torch.zeros(rows, device=device)}
        return found


def without(condition: Condition, *, keep: Sequence[str] = ()) -> Condition:
    """The condition with all but the named ones taken away."""

    def none(value: Tensor) -> Tensor:
        return torch.zeros_like(value) if value.is_floating_point() else torch.full_like(value, -1)

    kept = {*keep, LOW_NOISE} if LOW in keep else keep
    return {name: value if name in kept else none(value) for name, value in condition.items()}


def learned(configs: dict[str, ConditionConfig], batch: Batch, seed: int) -> Condition:
    """The condition of a training batch: one of the captions of each row, and every condition dropped by itself.

    Which, is a function of (seed, row) alone.
    """
    row, found = batch["row"], {}
    for name, config in configs.items():
        kept = keyed.uniform(seed, f"{name}_dropout", row) >= config.dropout
        if name == TEXT:
            found[name] = _caption(config, batch, seed) * kept[:, None, None]
        elif name == LOW:
            level = config.noise * keyed.uniform(seed, "low_level", row)
            noise = keyed.normal(seed, "low_noise", row, tuple(batch[LOW].shape[1:]))
            found |= {LOW: noisy(batch[LOW], level, noise) * kept[:, None, None, None], LOW_NOISE: level * kept}
        else:
            found[name] = torch.where(kept, batch[name], -1)
    return found


def noisy(images: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Images uint8 [B, C, H, W] in [-1, 1], with noise of a level [B] in their place by so much of their variance."""
    level = level[:, None, None, None]
    return torch.sqrt(1 - level**2) * (images.float() / 127.5 - 1) + level * noise


def _caption(config: ConditionConfig, batch: Batch, seed: int) -> Tensor:
    (first, *others), total, begin = config.captions, sum(config.captions.values()), 0.0
    value = batch[f"{TEXT}_{first}"]
    if not others:
        return value
    drawn = keyed.uniform(seed, "caption", batch["row"]) * total
    for before, caption in zip(config.captions, others, strict=False):
        begin += config.captions[before]
        value = torch.where((drawn >= begin)[:, None, None], batch[f"{TEXT}_{caption}"], value)
    return value


class Embedding(nn.Module):
    """A condition as what networks take: one vector, and tokens to attend to.

    Args:
        width: of the vector; 0: tokens alone, for networks that have no place for a vector or make their own.
    """

    def __init__(self, conditions: Conditions, width: int) -> None:
        super().__init__()
        # The last entry of each stands for none.
        values = conditions.values if width else {}
        self.values = nn.ModuleDict({name: nn.Embedding(n + 1, width) for name, n in values.items()})
        self.text = conditions.text
        if self.text:
            tokens, depth = self.text
            self.whole_text = nn.Linear(depth, width) if width else None
            self.no_text = nn.Embedding(1, tokens * depth)
        self.low_noise = nn.Linear(LEVELS, width) if conditions.low and width else None

    def forward(self, condition: Condition) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The vector [B, width], the tokens [B, T, D], and which of these there are, bool [B, T]; None for what no
        condition gives."""
        parts, tokens, there = list[Tensor](), None, None
        for name, table in self.values.items():
            number = condition[name]
            assert isinstance(table, nn.Embedding)
            parts.append(table(torch.where(number < 0, table.num_embeddings - 1, number)))
        if self.text:
            given = condition[TEXT]
            there = (given != 0).any(-1)
            none = ~there.any(-1)
            empty = self.no_text(torch.zeros_like(none, dtype=torch.long)).view(given.shape)
            tokens = torch.where(none[:, None, None], empty, given.to(empty.dtype))
            there = there | none[:, None]
            # The mean of the tokens is what sentence encoders are trained for.
            share = there.to(tokens.dtype) / there.sum(-1, keepdim=True)
            if self.whole_text is not None:
                parts.append(self.whole_text((tokens * share[:, :, None]).sum(1)))
        if self.low_noise is not None:
            from diffusers.models.embeddings import get_timestep_embedding

            waves = get_timestep_embedding(condition[LOW_NOISE] * 1000, LEVELS)
            parts.append(self.low_noise(waves.to(self.low_noise.weight.dtype)))
        return reduce(torch.add, parts) if parts else None, tokens, there
