"""Learn adversarial patches against classifiers of this project, and a network of styles, for the obfuscations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj import classifiers
from rayproj.config import below
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.engine.training import Link
from rayproj.engine.world import World
from rayproj.errors import Interrupted, UserError
from rayproj.obfuscation import scenes
from rayproj.obfuscation.assets import PATCHES, STYLES
from rayproj.obfuscation.patches import train_patches
from rayproj.obfuscation.styles import train_styles
from rayproj.storage.store import Store


@dataclass
class LearnConfig:
    """On which images, and how long."""

    images: str = "???"  # a dataset: what patches are laid onto, and what is repainted
    samples: int = 512  # of them, the first
    # Run dirs of jobs/train_classifier.py that the patches are learned against, with the classes of the images; patches are
    # learned against this project's own classifiers alone. []: no patches.
    classifiers: list[str] = field(default_factory=list)
    targets: list[str] = field(
        default_factory=list
    )  # classes that a patch makes them say, one for each; []: the first eight
    patch_side: int = 0  # pixels; 0: a quarter of the images' side
    patch_steps: int = 200
    # Datasets that styles are taken from, the first `styles` and `textures` images; "": procedural paintings and textures.
    paintings: str = ""
    surfaces: str = ""
    styles: int = 9
    textures: int = 8
    style_steps: int = 1000  # 0: no network of styles
    style_side: int = 64  # of the images that the network learns on
    batch: int = 16

    def problems(self) -> list[str]:
        positive = ("samples", "styles", "textures", "batch", "style_side")
        found = [f"learn.{name} must be positive." for name in positive if getattr(self, name) < 1]
        return found + below(0, "learn", self, "patch_side", "patch_steps", "style_steps")


def learn(config: LearnConfig, seed: int, store: Store, world: World, link: Link) -> dict[str, Any]:
    """Write `patches.safetensors` and `styles.safetensors` into the run's folder.

    Returns:
        The last losses, and of patched images the share that was taken for the patch's class.

    Raises:
        UserError: images or a run are not there, or a target is no class.
        Interrupted: a stop was asked for.
    """
    from safetensors.torch import save

    dataset = Dataset.open(config.images)
    first = np.arange(min(config.samples, dataset.header.num_samples))
    images = torch.from_numpy(Reader(dataset, ["image"]).gather(first)["image"]).to(world.device)
    total = (config.patch_steps if config.classifiers else 0) + config.style_steps
    link.report({"type": "total", "steps": total})
    found: dict[str, Any] = {}
    if config.classifiers:
        models = [classifiers.load(run, world.device) for run in config.classifiers]
        targets = _targets(config, dataset)
        side = config.patch_side or max(4, min(images.shape[2:]) // 4)
        told = _Told(link, 0, "patch loss")
        patches, hit = train_patches(models, images, targets, side, config.patch_steps, config.batch, seed, told)
        store.write(PATCHES, save({"patches": patches.cpu().contiguous()}))
        found |= {"patches": len(patches), "patch_targets": targets, "patch_success": hit, "patch_loss": told.last}
    if config.style_steps:
        size = (config.style_side, config.style_side)
        repainted = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
        examples = (
            _styles(config.paintings, config.styles, scenes.paintings),
            _styles(config.surfaces, config.textures, scenes.textures),
        )
        told = _Told(link, total - config.style_steps, "style loss")
        network = train_styles(*examples, repainted, config.style_steps, max(1, config.batch // 4), seed, told=told)
        store.write(STYLES, network.cpu().save())
        found |= {"styles": config.styles, "textures": config.textures, "style_loss": told.last}
    return found


class _Told:
    """Passes losses on, and stops where it is asked to."""

    def __init__(self, link: Link, before: int, name: str) -> None:
        self.link, self.before, self.name, self.last = link, before, name, 0.0

    def __call__(self, step: int, loss: float) -> None:
        if self.link.stop_requested():
            raise Interrupted
        self.last = loss
        self.link.beat(self.before + step)
        if step % 10 == 0:
            self.link.report({"type": "metrics", "step": self.before + step, self.name: loss})


def _targets(config: LearnConfig, dataset: Dataset) -> list[int]:
    classes = dataset.header.classes
    if wrong := [name for name in config.targets if name not in classes]:
        raise UserError(f"learn.targets has '{wrong[0]}'; the classes are {', '.join(classes)}.")
    return [classes.index(name) for name in config.targets] or list(range(min(8, len(classes))))


def _styles(uri: str, count: int, made: Any) -> Tensor:
    if not uri:
        return made(count)  # type: ignore[no-any-return]
    dataset = Dataset.open(uri)
    images = torch.from_numpy(
        Reader(dataset, ["image"]).gather(np.arange(min(count, dataset.header.num_samples)))["image"]
    )
    return images.expand(-1, 3, -1, -1)
