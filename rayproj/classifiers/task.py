"""Classification as a Task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayproj.classifiers.augment import AugmentConfig, augmented
from rayproj.classifiers.epinet import EpistemicNetwork, Kind
from rayproj.classifiers.model import ClassifierConfig, network, start, weights_of
from rayproj.classifiers.objective import Objective, ObjectiveConfig
from rayproj.data.dataset import Header
from rayproj.engine.task import Batch, train_only


class ClassificationTask:
    """The objective's losses of keyed random changes of the images; of an epistemic network their mean over keyed indices.

    Args:
        images: the header of a dataset with the fields "image" and "label".
        init: run dir of a classifier of the same size to start from; an epinet's may be that of its base.
        trainable: regular expression: parameters in whose names it is found are trained, the others stay.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        images: Header,
        seed: int,
        augment: AugmentConfig | None = None,
        objective: Objective | None = None,
        init: str = "",
        trainable: str = "",
    ) -> None:
        self.config, self.seed, self.augment = config, seed, augment or AugmentConfig()
        self.objective = objective or Objective(ObjectiveConfig())
        self.init, self.trainable, self.starts_trained = init, trainable, bool(init)
        self.image_channels = images.fields["image"].shape[0]
        self.num_classes = len(images.classes)

    def build(self) -> nn.Module:
        return self._network(self.init)

    def network(self) -> nn.Module:
        """The model with no regard to what it starts from, which may not be there yet."""
        return self._network("")

    def _network(self, init: str) -> nn.Module:
        torch.manual_seed(self.seed)
        model = network(self.config, self.image_channels, self.num_classes)
        if init:
            start(model, weights_of(init))
        train_only(model, self.trainable, "trainable", model.fixed() if isinstance(model, EpistemicNetwork) else ())
        self.objective.prepare(model)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images = augmented(batch["image"], batch["row"], self.seed, self.augment)
        label, row = batch["label"], batch["row"]
        if self.config.epistemic.kind is Kind.none:
            return self.objective(model, model(images), label, row)
        epistemic: Any = model  # or what DeepSpeed has around it
        logits = model(images, epistemic.training_indices(self.seed, row))
        indices = len(logits)
        losses = self.objective(model, logits.flatten(0, 1), label.repeat(indices), row.repeat(indices, 1))
        return losses.unflatten(0, (indices, -1)).mean(0)

    def preview(self, model: nn.Module) -> np.ndarray | None:
        return None
