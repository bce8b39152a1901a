"""Classification as a Task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rayproj.classifiers.augment import AugmentConfig, augmented
from rayproj.classifiers.model import ClassifierConfig, ConvNet, weights_of
from rayproj.classifiers.objective import Objective, ObjectiveConfig
from rayproj.data.dataset import Header
from rayproj.engine.engine import load_flat
from rayproj.engine.task import Batch, train_only


class ClassificationTask:
    """The objective's losses of keyed random changes of the images.

    Args:
        images: the header of a dataset with the fields "image" and "label".
        init: run dir of a classifier of the same size to start from.
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
        model = ConvNet(self.config, self.image_channels, self.num_classes)
        if init:
            load_flat(model, weights_of(init))
        train_only(model, self.trainable, "trainable")
        self.objective.prepare(model)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images = augmented(batch["image"], batch["row"], self.seed, self.augment)
        return self.objective(model, model(images), batch["label"], batch["row"])

    def preview(self, model: nn.Module) -> np.ndarray | None:
        return None
