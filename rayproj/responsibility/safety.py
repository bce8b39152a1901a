"""Which images may be shown or written: the rules of curation, applied to what was just drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayproj import config as configuration
from rayproj.curation.scorers import RuleConfig, Scorer, file_of, scorer
from rayproj.errors import UserError

GREY = 128  # of an image that may not be shown, where something has to stand in its place
OF_IMAGES = (Scorer.model, Scorer.sharpness, Scorer.contrast)  # scorers that need nothing but the image


@dataclass
class SafetyConfig:
    """Rules that every image has to pass. No model of unsafe images comes with this package: give one by its path."""

    # The reason -> the rule, such as {unsafe: {scorer: model, model: models/nsfw.onnx, size: 224, at_most: 0.5}}.
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    tries: int = 16  # images that are drawn for a sample of a dataset until one passes

    def problems(self) -> list[str]:
        wrong = [name for name, rule in self.rules.items() if rule.scorer not in OF_IMAGES]
        names = ", ".join(scorer.value for scorer in OF_IMAGES)
        found = [f"safety.rules.{name}: the scorer is one that judges an image alone: {names}." for name in wrong]
        return found if self.tries >= 1 else [*found, "safety.tries must be at least 1."]


class Safety:
    """Judges images.

    Raises:
        UserError: a model that is not there or cannot be used.
    """

    def __init__(self, config: SafetyConfig, device: str = "cpu") -> None:
        self.config = config
        self.judges = {name: scorer(rule, device) for name, rule in config.rules.items()}

    def reasons(self, images: np.ndarray) -> list[list[str]]:
        """For each of uint8 images [n, C, H, W] the rules that it does not pass."""
        outside = {name: rule.outside(self.judges[name]({"image": images})) for name, rule in self.config.rules.items()}
        return [[name for name, wrong in outside.items() if wrong[i]] for i in range(len(images))]

    def greyed(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, C, H, W], those that may not be shown of an even grey."""
        wrong = np.array([bool(names) for names in self.reasons(images)], bool)
        return np.where(wrong[:, None, None, None], np.uint8(GREY), images)

    def replaced(self, images: np.ndarray, again: Callable[[np.ndarray, int], np.ndarray]) -> list[list[list[str]]]:
        """Draw those that may not be shown anew, in place, at most `tries` times in all.

        Args:
            images: uint8 [n, C, H, W].
            again: draws the images at some places int [m] from other noise, by the number of the try, from 1.

        Returns:
            Of each image the rules that each of those before it did not pass; as many as `tries` if none did.
        """
        withheld: list[list[list[str]]] = [[] for _ in images]
        left = np.arange(len(images))
        for number in range(self.config.tries):
            if number:
                images[left] = again(left, number)
            reasons = self.reasons(images[left])
            for place, names in zip(left, reasons, strict=True):
                if names:
                    withheld[place].append(names)
            left = left[np.array([bool(names) for names in reasons], bool)]
            if not len(left):
                break
        return withheld


TRIES = "tries"  # a field of datasets: how many images were drawn until one passed the rules


def described(config: SafetyConfig) -> dict[str, Any]:
    """For a dataset's header: the rules, with the SHA-256 of their models.

    Raises:
        UserError: a model is not there.
    """
    rules = {name: {**asdict(rule), "scorer": rule.scorer.value} for name, rule in config.rules.items()}
    models = {rule.model for rule in config.rules.values() if rule.model}
    try:
        hashes = {model: hashlib.sha256(Path(file_of(model)).read_bytes()).hexdigest() for model in sorted(models)}
    except OSError as error:
        raise UserError(f"A model of safety.rules cannot be read ({error}); check its path.") from error
    return {"rules": rules, "tries": config.tries, "models": hashes}


def planned(said: dict[str, Any]) -> SafetyConfig:
    """The rules that a dataset's header says.

    Raises:
        UserError: a model is gone, or another by now.
    """
    config = configuration.from_dict(SafetyConfig, {name: said[name] for name in ("rules", "tries")})
    if (now := described(config)["models"]) != said["models"]:
        changed = next(model for model in now if now[model] != said["models"][model])
        raise UserError(
            f"The model '{changed}' of safety.rules is another than was planned with; put the old one back."
        )
    return config
