"""The obfuscations by name, alone and as a mixture in training.

A user's own is a dataclass derived from `Obfuscation`, which goes by where it is imported from, "package.module:Class".
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayproj import keyed
from rayproj.errors import UserError
from rayproj.obfuscation import colour, composition, learned, overlay, transformation
from rayproj.obfuscation.assets import Assets, AssetsConfig
from rayproj.obfuscation.base import Obfuscation

CLEAN = "Clean"  # the benchmark's name of the images as they are
DRAW = "#"  # between the name of an image and the number of a draw

# In the order of the benchmark: by name, those that are held out at the end.
OBFUSCATIONS: dict[str, type[Obfuscation]] = {
    kind.name(): kind
    for kind in (
        learned.AdversarialPatches,
        composition.BackgroundBlurComposition,
        colour.ColorNoiseBlocks,
        colour.Halftoning,
        composition.HighContrastBorder,
        overlay.IconOverlay,
        overlay.ImageOverlay,
        overlay.Interleave,
        colour.InvertLines,
        transformation.LineShift,
        transformation.PerspectiveTransform,
        composition.PhotoComposition,
        transformation.RotateBlocks,
        transformation.RotateImage,
        learned.StyleTransfer,
        transformation.SwirlWarp,
        overlay.TextOverlay,
        learned.Texturize,
        transformation.WavyColorWarp,
        overlay.ColorPatternOverlay,
        colour.LowContrastTriangles,
        composition.PerspectiveComposition,
    )
}
TRAINING = tuple(name for name, kind in OBFUSCATIONS.items() if not kind.held_out)
HELD_OUT = tuple(name for name, kind in OBFUSCATIONS.items() if kind.held_out)
GROUPS = tuple(sorted({kind.group for kind in OBFUSCATIONS.values()}))
SETS = {
    "all": tuple(OBFUSCATIONS),
    "training": TRAINING,
    "held_out": HELD_OUT,
    **{group: tuple(name for name in TRAINING if OBFUSCATIONS[name].group == group) for group in GROUPS},
}


def chosen(names: Sequence[str], assets: AssetsConfig | None = None) -> tuple[str, ...]:
    """The obfuscations of a list of names and of sets: all, training, held_out, or a group (without what is held out). Of
    sets, those are left out that need what was not learned. A user's own are in no set, and come last.

    Raises:
        UserError: a name that is neither, a set of which nothing is left, or one that cannot be imported.
    """
    found: list[str] = []
    for name in names:
        if name not in SETS:
            of_name(name)
            found.append(name)
            continue
        there = [n for n in SETS[name] if assets is None or assets.learned or not OBFUSCATIONS[n].needs]
        if not there:
            raise UserError(
                f"The obfuscations '{name}' need the run dir of jobs/learn_obfuscations.py in assets.learned."
            )
        found += there
    own = [name for name in dict.fromkeys(found) if name not in OBFUSCATIONS]
    return (*(name for name in OBFUSCATIONS if name in found), *own)


def of_name(name: str) -> type[Obfuscation]:
    """One of the benchmark's, or a user's own by "package.module:Class".

    Raises:
        UserError: there is none of that name.
    """
    if name in OBFUSCATIONS:
        return OBFUSCATIONS[name]
    module, colon, of_class = name.partition(":")
    if not colon:
        names = ", ".join([*OBFUSCATIONS, *SETS])
        raise UserError(f"There is no obfuscation '{name}'; there are {names}, and your own as package.module:Class.")
    try:
        kind = getattr(importlib.import_module(module), of_class)
    except Exception as error:  # whatever the user's module does
        raise UserError(
            f"The obfuscation '{name}' cannot be imported ({type(error).__name__}: {error}); it is package.module:Class, of "
            "a module on the PYTHONPATH of every worker."
        ) from error
    try:
        fits = issubclass(kind, Obfuscation) and "__dataclass_fields__" in vars(kind) and kind.ranges() is not None
    except (TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"'{name}' is no obfuscation; derive a dataclass from rayproj.obfuscation.Obfuscation whose fields are each "
            "annotated with their range, as Annotated[Tensor, between(0, 1)]."
        )
    return kind  # type: ignore[no-any-return]


def obfuscate(
    name: str, images: Tensor, row: Tensor, seed: int, assets: Assets, severity: int = 0
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Obfuscate images, uint8 [B, C, H, W], by parameters that are drawn for their rows, int64 [B, 3].

    Args:
        severity: 1 to 5, as in `Obfuscation.draw`; 0: over the whole ranges, as the benchmark does.

    Returns:
        uint8 of the same shape, and the parameters of each image.

    Raises:
        UserError: it needs what was not learned, or is a user's own and gives something else.
    """
    drawn = of_name(name).draw(row, seed, severity)
    return drawn(images, assets), drawn.records() or [{} for _ in row]


def regenerate(name: str, images: Tensor, records: Sequence[dict[str, Any]], assets: Assets) -> Tensor:
    """The same images again from the parameters of `obfuscate`, bit for bit, on the same kind of device."""
    return of_name(name).of(records, images.device)(images, assets)


@dataclass
class ObfuscateConfig:
    """Obfuscations of training images."""

    # Of which one is drawn for an image: names, or all, training, held_out, colour, composition, learned, overlay,
    # transformation, or your own as package.module:Class. []: none. Whoever trains on those that are held out has nothing
    # left that would be new.
    names: list[str] = field(default_factory=list)
    share: float = 0.5  # of the images that are obfuscated
    without: list[str] = field(default_factory=list)  # of them, names or sets that are left out: to be tested on
    weights: dict[str, float] = field(default_factory=dict)  # name -> how often it is drawn, where that is not 1
    assets: AssetsConfig = field(default_factory=AssetsConfig)

    def problems(self) -> list[str]:
        found = [] if 0 <= self.share <= 1 else [f"obfuscate.share must lie in [0, 1], not {self.share:g}."]
        try:
            drawn = self.drawn
        except UserError as error:
            return [*found, str(error)]
        lacking = [name for name in drawn if of_name(name).needs and not self.assets.learned]
        if self.names and not drawn:
            found.append("obfuscate.without leaves none of obfuscate.names.")
        if unknown := sorted(set(self.weights) - set(drawn)):
            found.append(f"obfuscate.weights has '{unknown[0]}', which is not drawn; it has {', '.join(drawn)}.")
        if drawn and min(self._weights) <= 0:
            found.append(
                "obfuscate.weights must be positive; what is not to be drawn is left out by obfuscate.without."
            )
        if lacking:
            found.append(
                f"obfuscate.names: {lacking[0]} needs the run dir of jobs/learn_obfuscations.py in obfuscate.assets.learned."
            )
        return found

    @property
    def drawn(self) -> tuple[str, ...]:
        """What an obfuscated image is obfuscated by.

        Raises:
            UserError: a name that is none.
        """
        left_out = chosen(self.without) if self.without else ()
        return tuple(name for name in chosen(self.names, self.assets) if name not in left_out)

    @property
    def _weights(self) -> list[float]:
        return [self.weights.get(name, 1.0) for name in self.drawn]

    def shares(self) -> list[float]:
        """How often each is drawn, as shares of the obfuscated images."""
        return [weight / sum(self._weights) for weight in self._weights]


def mixture(images: Tensor, row: Tensor, seed: int, config: ObfuscateConfig) -> Tensor:
    """Images, uint8 [B, C, H, W], of which a share is obfuscated, each by one of those that the config names."""
    names = config.drawn
    assets = Assets.load(config.assets, str(images.device))
    draw = keyed.uniform(seed, "obfuscations", row, (2,))
    until = draw.new_tensor(config.shares()).cumsum(0)[:-1]
    which = torch.where(
        draw[:, 0] < config.share, torch.searchsorted(until, draw[:, 1].contiguous(), right=True), -1
    ).tolist()
    found = images.clone()
    for number in sorted(set(which) - {-1}):
        place = torch.tensor([i for i, w in enumerate(which) if w == number], device=images.device)
        found[place] = obfuscate(names[number], images[place], row[place], seed, assets)[0]
    return found
