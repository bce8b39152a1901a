"""Classification as a Task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayproj.classifiers import adversary as adversaries
from rayproj.classifiers.adversary import AdversaryConfig, Training
from rayproj.classifiers.augment import AugmentConfig, augmented
from rayproj.classifiers.epinet import Bootstrap, EpistemicKind, EpistemicNetwork, weights
from rayproj.classifiers.model import StartConfig, network_for
from rayproj.classifiers.networks import ClassifierConfig
from rayproj.classifiers.objective import Objective, ObjectiveConfig
from rayproj.data.dataset import Header
from rayproj.engine.task import Batch, train_only


class ClassificationTask:
    """The objective's losses of keyed random changes of the images, and of what an adversary makes of them; of an epistemic
    network their mean over keyed indices.

    Args:
        images: the header of a dataset with the fields "image" and "label".
        start: what to start from; an epinet's may be that of its base.
        trainable: regular expression: parameters in whose names it is found are trained, the others stay.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        images: Header,
        seed: int,
        augment: AugmentConfig | None = None,
        objective: Objective | None = None,
        start: StartConfig | None = None,
        trainable: str = "",
        adversary: AdversaryConfig | None = None,
    ) -> None:
        self.config, self.images, self.seed = config, images, seed
        self.augment, self.adversary = augment or AugmentConfig(), adversary or AdversaryConfig()
        self.objective = objective or Objective(ObjectiveConfig())
        self.start, self.trainable = start or StartConfig(), trainable
        self.starts_trained = bool(self.start)

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        start = self.start
        return self._ready(start.network(self.config, self.images) if start else network_for(self.config, self.images))

    def network(self) -> nn.Module:
        """The model with no regard to what it starts from, which may not be there yet."""
        torch.manual_seed(self.seed)
        return self._ready(network_for(self.config, self.images))

    def _ready(self, model: nn.Module) -> nn.Module:
        train_only(model, self.trainable, "trainable", model.fixed() if isinstance(model, EpistemicNetwork) else ())
        self.objective.prepare(model)
        adversaries.prepare(model, self.adversary)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        label, row = batch["label"], batch["row"]
        images = augmented(batch["image"], row, self.seed, self.augment)

        def objective(logits: Tensor) -> Tensor:
            times = len(logits) // len(label)
            return self.objective(model, logits, label.repeat(times), row.repeat(times, 1))

        if self.config.epistemic.kind is not EpistemicKind.none:
            return self._over_indices(model, images, row, objective)
        if self.adversary.training is Training.none:
            return objective(model(images))
        return adversaries.losses(model, images, label, row, objective, self.adversary, self.seed)

    def _over_indices(self, model: nn.Module, images: Tensor, row: Tensor, objective: adversaries.Losses) -> Tensor:
        epistemic: Any = model  # or what DeepSpeed has around it
        z, bootstrap = epistemic.training_indices(self.seed, row), self.config.epistemic.bootstrap
        logits = model(images, z)
        losses = objective(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
        if bootstrap is not Bootstrap.none:
            losses = losses * weights(bootstrap, epistemic.quantiles(self.seed, row[:, 0], z))
        return losses.mean(0)

    def preview(self, model: nn.Module) -> np.ndarray | None:
        return None
