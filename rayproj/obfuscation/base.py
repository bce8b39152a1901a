"""What an obfuscation is: parameters that are drawn for each image, and a function of images and parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from rayproj import keyed
from rayproj.errors import UserError
from rayproj.obfuscation.assets import Assets

AT_ONCE = 2**20  # values of images at once on a CPU, whose cache holds them and what is made of them
SEVERITIES = (1, 2, 3, 4, 5)  # of obfuscations, as of the common corruptions (`rayproj.evaluation.corruptions`)


class Harder(StrEnum):
    """Where in its range a parameter makes an image harder to recognise."""

    none = "none"  # it is no matter of strength
    more = "more"
    less = "less"
    outer = "outer"  # far from the middle
    inner = "inner"

    def place(self, u: Tensor, severity: int) -> Tensor:
        """Draws from [0, 1) as those of one fifth of a range, the fifth one being the hardest."""
        if self is Harder.none:
            return u
        fifth = severity if self in (Harder.more, Harder.outer) else len(SEVERITIES) + 1 - severity
        if self in (Harder.more, Harder.less):
            return (fifth - 1 + u) / len(SEVERITIES)
        side = (u < 0.5).to(u) * 2 - 1  # half of the draws lie on either side of the middle
        return 0.5 - 0.5 * side * (fifth - 1 + (2 * u) % 1) / len(SEVERITIES)


@dataclass(frozen=True)
class Range:
    """What a parameter is drawn from, evenly: [low, high), or whole numbers from low to high; `count` of them."""

    low: float
    high: float
    whole: bool
    count: int  # 0: one number and no list
    harder: Harder = Harder.none


def between(low: float, high: float, count: int = 0, harder: str = "none") -> Range:
    """A parameter that is a number, fp32 [B] or [B, count]."""
    return Range(low, high, False, count, Harder(harder))


def whole(low: int, high: int) -> Range:
    """A parameter that is a whole number, both ends among them: int64 [B]."""
    return Range(low, high, True, 0)


# What the values of single blocks are drawn by, where an image has too many of them to be kept.
KEY = whole(0, 2**24 - 1)


@dataclass
class Obfuscation(ABC):
    """One of the benchmark's or of a user's own, a dataclass with the parameters of a batch as its fields, each annotated
    with what it is drawn from.

    Lengths are shares of an image's shorter side, so that they mean the same at any size.

    Attributes:
        group: of the benchmark's kinds, or "own".
        held_out: that classifiers are not to be trained on it, so that it shows what they make of new ones.
        needs: what of the assets must have been learned.
    """

    group: ClassVar[str] = "own"
    held_out: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @classmethod
    def ranges(cls) -> dict[str, Range]:
        """What each parameter is drawn from."""
        hints = get_type_hints(cls, include_extras=True)
        return {f.name: hints[f.name].__metadata__[0] for f in dataclasses.fields(cls)}

    @classmethod
    def draw(cls, row: Tensor, seed: int, severity: int = 0) -> Self:
        """The parameters of images by their rows, int64 [B, 3] as in `rayproj.keyed`.

        Args:
            severity: 1 to 5: of parameters that are a matter of strength one fifth of the range each; 0: all of it.
        """
        ranges = cls.ranges()
        sizes = [max(1, r.count) for r in ranges.values()]
        uniform = keyed.uniform(seed, f"obfuscation/{cls.name()}", row, (sum(sizes),)).double()
        found = {}
        for (name, r), u in zip(ranges.items(), uniform.split(sizes, dim=1), strict=True):
            u = r.harder.place(u, severity) if severity else u
            value = r.low + u * (r.high + r.whole - r.low)
            found[name] = (value.floor().long() if r.whole else value.float())[:, slice(None) if r.count else 0]
        return cls(**found)

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], device: torch.device | str = "cpu") -> Self:
        """The inverse of `records`.

        Raises:
            UserError: they are of another obfuscation.
        """
        ranges = cls.ranges()
        if wrong := next((r for r in records if r.keys() != ranges.keys()), None):
            raise UserError(f"{cls.name()} has the parameters {', '.join(ranges)}, and not {', '.join(wrong)}.")
        kinds = {name: torch.int64 if r.whole else torch.float32 for name, r in ranges.items()}
        return cls(**{n: torch.tensor([r[n] for r in records], dtype=kind, device=device) for n, kind in kinds.items()})

    def records(self) -> list[dict[str, Any]]:
        """The parameters of each image, as JSON takes them: they give the same images again, bit for bit."""
        columns = {name: getattr(self, name).tolist() for name in self.ranges()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @classmethod
    def require(cls, assets: Assets) -> None:
        """
        Raises:
            UserError: the assets lack what the obfuscation needs.
        """
        if not assets.has(cls.needs):
            raise UserError(
                f"{cls.name()} needs {cls.needs} that were learned: run jobs/learn_obfuscations.py and give its run dir as "
                "assets.learned, or leave it out."
            )

    def __call__(self, images: Tensor, assets: Assets) -> Tensor:
        """uint8 [B, C, H, W] of images of the same shape; C is 1 or 3. An image's result depends on no other image.

        Raises:
            UserError: the obfuscation, a user's own, gives something else.
        """
        size = len(images) if images.is_cuda else max(1, AT_ONCE // images[0].numel())
        if size >= len(images):
            return self._checked(images, assets)
        columns = [getattr(self, name).split(size) for name in self.ranges()]
        parts = [type(self)(*part)._checked(x, assets) for *part, x in zip(*columns, images.split(size), strict=True)]
        return torch.cat(parts)

    def _checked(self, images: Tensor, assets: Assets) -> Tensor:
        found = self.changed(images, assets)
        if found.shape != images.shape or found.dtype is not torch.uint8:
            said = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (images, found)]
            raise UserError(
                f"{self.name()} makes {said[1]} of {said[0]}; an obfuscation gives uint8 of the same shape."
            )
        return found

    @abstractmethod
    def changed(self, images: Tensor, assets: Assets) -> Tensor:
        """What `__call__` does, of images that a cache holds."""
