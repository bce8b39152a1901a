"""What images pass between the model that drew them and the dataset: safety rules, and an invisible watermark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rayproj.data.dataset import WITHHELD, Dataset
from rayproj.data.reader import Reader
from rayproj.errors import UserError
from rayproj.evaluation.watermark import WatermarkConfig, key_name, mark, read_key
from rayproj.responsibility import safety
from rayproj.responsibility.safety import TRIES, Safety, SafetyConfig
from rayproj.storage.store import from_json, to_json


def described(watermark: WatermarkConfig, rules: SafetyConfig) -> dict[str, Any]:
    """What a dataset's header says of it.

    Raises:
        UserError: the key or a model cannot be read.
    """
    found: dict[str, Any] = {}
    if watermark.key:
        found["watermark"] = {"key": key_name(read_key(watermark.key)), "strength": watermark.strength}
    return found | ({"safety": safety.described(rules)} if rules.rules else {})


class Gate:
    """As a dataset's header says.

    Args:
        key: the file with the watermark's secret, where there is one.
        section: of the config, for messages: "generate" or "upscale".

    Raises:
        UserError: the key or a model of the rules is another than was planned with.
    """

    def __init__(self, dataset: Dataset, key: str, device: str, section: str) -> None:
        self.dataset, self.section = dataset, section
        said = dataset.header.provenance
        self.strength = said["watermark"]["strength"] if "watermark" in said else 0.0
        self.secret = read_key(key) if self.strength else b""
        if self.secret and key_name(self.secret) != said["watermark"]["key"]:
            raise UserError(f"The key '{key}' is not the one that {dataset.uri} was planned with; give that one.")
        self.safety = Safety(safety.planned(said["safety"]), device) if "safety" in said else None
        self.withheld: dict[int, list[list[str]]] = {}  # by sample: the reasons of each image that did not pass

    def through(
        self,
        ids: np.ndarray,
        draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
        shows: Callable[[int], Any] = lambda sample: "no condition",
    ) -> np.ndarray:
        """uint8 images [n, C, H, W] of samples int [n], of which each may be shown, and marked; one that may not is drawn
        again from other noise.

        Args:
            draw: what samples show, from the noise of keys: (places in `ids`, keys), int [m] each.
            shows: what a sample is of, for messages.

        Raises:
            UserError: of a sample none may be shown.
        """
        images = draw(np.arange(len(ids)), ids)
        if self.safety:
            samples = self.dataset.header.num_samples
            found = self.safety.replaced(images, lambda at, number: draw(at, ids[at] + number * samples))
            self.withheld |= {int(i): reasons for i, reasons in zip(ids, found, strict=True)}
            self._refuse([int(i) for i in ids], shows)
        return mark(images, self.secret, self.strength) if self.secret else images

    def _refuse(self, samples: list[int], shows: Callable[[int], Any]) -> None:
        assert self.safety
        tries = self.safety.config.tries
        none = [i for i in samples if len(self.withheld[i]) == tries]
        if none:
            raise UserError(
                f"Of sample {none[0]} ({shows(none[0])}) none of {tries} images passed {self.section}.safety.rules "
                f"({', '.join(self.withheld[none[0]][-1])}); leave out what it is to show, raise "
                f"{self.section}.safety.tries, or loosen the rule, and give {self.section}.out another place."
            )

    def fields(self, sample: int) -> dict[str, int]:
        """What a sample's JSON says of it."""
        return {TRIES: 1 + len(self.withheld.get(sample, []))} if self.safety else {}

    def record(self, shard: int, samples: Iterable[int]) -> None:
        """Keep how many images of a shard did not pass."""
        if self.safety:
            reasons = [names for i in samples for names in self.withheld.get(i, [])]
            counts = Counter(name for names in reasons for name in names)
            self.dataset.store.write(
                f"{WITHHELD}/{shard:06d}.json", to_json({"images": len(reasons), "reasons": counts})
            )

    def forget(self, but: Callable[[int], bool]) -> None:
        """Of samples that are not asked for again."""
        self.withheld = {i: reasons for i, reasons in self.withheld.items() if but(i)}


def withheld(dataset: Dataset) -> dict[str, Any]:
    """How many images did not pass the safety rules of a dataset's plan, and how many each rule was against; of what a
    search for failures drew only their number is kept."""
    images, reasons, recorded = 0, Counter[str](), dataset.store.list(WITHHELD)
    if not recorded and TRIES in dataset.header.fields:
        tries = Reader(dataset, [TRIES]).gather(np.arange(dataset.header.num_samples))[TRIES]
        images = int((tries - 1).sum())
    for path in recorded:
        one = from_json(dataset.store.read(path))
        images += one["images"]
        reasons.update(one["reasons"])
    return {"images": images, "reasons": dict(sorted(reasons.items()))}
