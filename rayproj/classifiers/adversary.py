"""Training against an adversary: losses [B] of images and of what an attack makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed
from rayproj.classifiers.adapters import ADVERSARIAL, CLEAN, Adapted
from rayproj.robustness.losses import Loss, cross_entropy
from rayproj.robustness.oracle import Oracle
from rayproj.robustness.pgd import msd, pgd
from rayproj.robustness.threats import Norm, Threat


class Training(Enum):
    none = "none"
    adversarial = "adversarial"  # on the attacked images alone (Madry et al. 2018)
    trades = "trades"  # cross-entropy, and β times how far the attack moves the prediction (Zhang et al. 2019, eq. 5)
    # α of the loss on the images, 1 - α of that on the attacked ones (Rebuffi, Croce and Gowal 2023, eq. 2)
    co_training = "co_training"


class Several(Enum):
    """What is made of several threats."""

    drawn = "drawn"  # one a step, drawn evenly (SAT, Madaan et al. 2021)
    worst = "worst"  # of each image the attack of the highest loss (MAX, Tramèr and Boneh 2019)
    steepest = "steepest"  # one attack, each of whose steps is the worst among the threats' (MSD, Maini et al. 2020)


@dataclass
class ThreatConfig:
    """A ball around each image, whose values lie in [0, 1]."""

    norm: Norm = Norm.linf
    eps: float = 8 / 255

    def problems(self) -> list[str]:
        return self.threat.problems()

    @property
    def threat(self) -> Threat:
        return Threat(self.norm, self.eps)


@dataclass
class AdversaryConfig:
    """Who attacks in training, and what is made of it."""

    training: Training = Training.none
    threats: list[ThreatConfig] = field(default_factory=lambda: [ThreatConfig()])
    several: Several = Several.drawn
    steps: int = 3  # of projected gradient ascent
    step: float = 0.5  # length of each, in radii
    random_start: bool = True
    alpha: float = 0.5  # co_training: share of the loss on the images as they are
    beta: float = 6.0  # trades

    def problems(self) -> list[str]:
        found = [
            f"adversary.{name} must be positive." for name in ("steps", "step", "beta") if getattr(self, name) <= 0
        ]
        if not 0 <= self.alpha <= 1:
            found.append(f"adversary.alpha must lie in [0, 1], not {self.alpha:g}.")
        return found if self.threats else [*found, "adversary.threats is empty."]


Losses = Callable[[Tensor], Tensor]
"""Losses [B] of logits [B, K]: the objective's, with the labels in it."""


def losses(
    model: nn.Module, images: Tensor, label: Tensor, row: Tensor, objective: Losses, config: AdversaryConfig, seed: int
) -> Tensor:
    """Per-example losses [B] of uint8 images [B, C, H, W]. With adapters, clean images go through the clean branch, and the
    attacked ones through the adversarial branch, which is also the one that is attacked; both in one pass.

    The attack draws by (seed, row): what it finds for an example depends on no other.
    """
    adapted = isinstance(_bare(model), Adapted)
    branch = _branches(adapted, images)
    x = images.float() / 255

    def attacked_branch(z: Tensor) -> Tensor:
        # Not through DeepSpeed's engine, which takes every gradient for one of the parameters.
        return _bare(model)(255 * z, **branch(ADVERSARIAL))  # type: ignore[no-any-return]

    if config.training is Training.adversarial:
        z = _attacked(model, attacked_branch, x, label, row, config, seed)
        return objective(model(255 * z, **branch(ADVERSARIAL)))
    if config.training is Training.trades:
        clean = model(255 * x, **branch(CLEAN))
        fixed = clean.detach().softmax(1)
        z = _attacked(
            model, attacked_branch, x, label, row, config, seed, lambda logits, *_: _divergence(logits, fixed)
        )
        return objective(clean) + config.beta * _divergence(model(255 * z, **branch(ADVERSARIAL)), clean.softmax(1))
    z = _attacked(model, attacked_branch, x, label, row, config, seed)
    both = {"mix": torch.cat([branch(CLEAN)["mix"], branch(ADVERSARIAL)["mix"]])} if adapted else {}
    first, second = model(255 * torch.cat([x, z]), **both).chunk(2)
    return config.alpha * objective(first) + (1 - config.alpha) * objective(second)


def _attacked(
    model: nn.Module, logits: Callable[[Tensor], Tensor], x: Tensor, label: Tensor, row: Tensor, config: AdversaryConfig,
    seed: int, loss: Loss = cross_entropy,
) -> Tensor:  # fmt: skip
    threats = [drawn(config, row, seed)] if config.several is Several.drawn else [t.threat for t in config.threats]
    oracle, start = Oracle(logits), row if config.random_start else None
    told = (config.steps, config.step, loss, seed)
    with evaluating(model):
        if config.several is Several.steepest:
            return msd(oracle, x, label, start, threats, *told).images.detach()
        found = [pgd(oracle, x, label, start, threat, *told).images.detach() for threat in threats]
        if len(found) == 1:
            return found[0]
        with torch.no_grad():
            reached = torch.stack([loss(logits(z), label, label) for z in found])
    return torch.stack(found)[reached.argmax(0), torch.arange(len(x), device=x.device)]


def drawn(config: AdversaryConfig, row: Tensor, seed: int) -> Threat:
    """The threat of a step of `Several.drawn`, by its number, which all rows of a batch share."""
    if len(config.threats) == 1:
        return config.threats[0].threat
    step = row[:1].clone()
    step[:, 0] = 0
    return config.threats[int(keyed.uniform(seed, "threat", step) * len(config.threats))].threat


def _divergence(logits: Tensor, of: Tensor) -> Tensor:
    """KL(of ‖ softmax(logits)), [B]."""
    return F.kl_div(logits.log_softmax(1), of, reduction="none").sum(1)


def _branches(adapted: bool, images: Tensor) -> Callable[[int], dict[str, Tensor]]:
    """Number of a branch to what the model is told of it."""

    def told(number: int) -> dict[str, Tensor]:
        mix = torch.zeros(len(images), 2, device=images.device)
        mix[:, number] = 1
        return {"mix": mix} if adapted else {}

    return told


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)  # inside DeepSpeed's engine


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, as the attacked model will be."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
