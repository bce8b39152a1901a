"""Training against an adversary: losses [B] of images and of what an attack makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rayproj import keyed
from rayproj.classifiers.adapters import ADVERSARIAL, CLEAN, Adapted
from rayproj.classifiers.objective import bare
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
    average = "average"  # all of them, and the mean of their losses (AVG, Tramèr and Boneh 2019)
    worst = "worst"  # of each image the attack of the highest loss (MAX, Tramèr and Boneh 2019)
    steepest = "steepest"  # one attack, each of whose steps is the worst among the threats' (MSD, Maini et al. 2020)
    # One a step, drawn in proportion to the share of the images that it has broken so far (E-AT, Croce and Hein 2022,
    # "Adversarial robustness against multiple and single lp-threat models via quick fine-tuning of robust classifiers",
    # section 4; theirs are the extremes ℓ∞ and ℓ1 alone).
    extreme = "extreme"


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
    targeted: bool = False  # towards another class, drawn for each image at each step; not up the loss of its own
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
        if self.targeted and self.training is Training.trades:
            found.append("adversary.targeted does not go with training=trades, whose attack knows no classes.")
        return found if self.threats else [*found, "adversary.threats is empty."]


Losses = Callable[[Tensor], Tensor]
"""Losses [n · B] of logits [n · B, K] of a batch n times over: the objective's, with the labels in it."""

# Buffers of a model in which E-AT keeps what came of the attacks, whole numbers that no cast touches: int32 [threats, 2]
# (misclassified, attacked) of the steps before, and int32 [4] (step, threat, misclassified, attacked) of the last one. They
# are apart so that all micro-batches of a step draw the same threat.
ERRORS, LATEST = "robust_errors", "robust_errors_latest"
MOST = 2**23  # images that are counted: checkpoints are fp32


def prepare(model: nn.Module, config: AdversaryConfig) -> None:
    """Give a model what the adversary keeps in it."""
    if config.training is not Training.none and config.several is Several.extreme:
        model.register_buffer(ERRORS, torch.zeros(len(config.threats), 2, dtype=torch.int32))
        model.register_buffer(LATEST, torch.zeros(4, dtype=torch.int32))


def losses(
    model: nn.Module, images: Tensor, label: Tensor, row: Tensor, objective: Losses, config: AdversaryConfig, seed: int
) -> Tensor:
    """Per-example losses [B] of uint8 images [B, C, H, W]. With adapters, clean images go through the clean branch, and the
    attacked ones through the adversarial branch or that of their threat, which is also the one that is attacked; all in one
    pass.

    The attack draws by (seed, row): what it finds for an example depends on no other.
    """
    x = images.float() / 255
    clean = torch.full_like(label, CLEAN)
    if config.training is Training.trades:
        logits = _logits(model, x, clean)
        fixed = logits.detach().softmax(1)
        found = _attacked(model, x, label, row, config, seed, lambda moved, *_: _divergence(moved, fixed))
        moved = _logits(model, *_joined(found)).chunk(len(found))
        return objective(logits) + config.beta * _mean([_divergence(one, logits.softmax(1)) for one in moved])
    found = _attacked(model, x, label, row, config, seed)
    if config.training is Training.adversarial:
        return _mean(objective(_logits(model, *_joined(found))).chunk(len(found)))
    first, *others = objective(_logits(model, *_joined([(x, clean), *found]))).chunk(1 + len(found))
    return config.alpha * first + (1 - config.alpha) * _mean(others)


def _logits(model: nn.Module, z: Tensor, branch: Tensor) -> Tensor:
    """Of images in [0, 1], each through the branch of its number, if the model has some."""
    own = bare(model)
    told = {"mix": torch.eye(len(own.names), device=branch.device)[branch]} if isinstance(own, Adapted) else {}
    return model(255 * z, **told)  # type: ignore[no-any-return]


def _joined(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, branches = zip(*found, strict=True)
    return torch.cat(images), torch.cat(branches)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _attacked(
    model: nn.Module, x: Tensor, label: Tensor, row: Tensor, config: AdversaryConfig, seed: int,
    loss: Loss = cross_entropy,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Attacked images and the branches [B] through which they were attacked; several where all threats count."""
    own = bare(model)  # not DeepSpeed's engine, which takes every gradient for one of the parameters
    each = isinstance(own, Adapted) and len(own.names) > 2
    numbers = list(range(len(config.threats)))
    if config.targeted:
        loss = _towards(keyed.uniform(seed, "target", row))
    planned = isinstance(row, FakeTensor)  # a plan counts memory: there are no numbers to draw by
    if config.several in (Several.drawn, Several.extreme):
        errors = _robust_errors(model, row) if config.several is Several.extreme and not planned else None
        numbers = [0 if planned else drawn(len(numbers), row, seed, errors)]
    start, told = row if config.random_start else None, (config.steps, config.step, loss, seed)
    with evaluating(model):
        if config.several is Several.steepest:
            branch, threats = torch.full_like(label, ADVERSARIAL), [t.threat for t in config.threats]
            oracle = Oracle(partial(_logits, own, branch=branch))
            return [(msd(oracle, x, label, start, threats, *told).images.detach(), branch)]
        found, reached = list[tuple[Tensor, Tensor]](), list[Tensor]()
        for number in numbers:
            branch = torch.full_like(label, ADVERSARIAL + number * each)
            oracle = Oracle(partial(_logits, own, branch=branch))
            attack = pgd(oracle, x, label, start, config.threats[number].threat, *told)
            found.append((attack.images.detach(), branch))
            if config.several is Several.worst and len(numbers) > 1:
                reached.append((cross_entropy if config.targeted else loss)(oracle.logits(found[-1][0]), label, label))
    if reached:
        worst, every = torch.stack(reached).argmax(0), torch.arange(len(x), device=x.device)
        return [tuple(torch.stack(all_)[worst, every] for all_ in zip(*found, strict=True))]  # type: ignore[list-item]
    if config.several is Several.extreme and not planned:
        _count(model, numbers[0], attack.broken, row)
    return found


def drawn(threats: int, row: Tensor, seed: int, errors: Tensor | None = None) -> int:
    """The number of a step's threat, by the number of the step, which all rows of a batch share.

    Args:
        errors: [threats], in proportion to which they are drawn; None: evenly.
    """
    if threats == 1:
        return 0
    step = row[:1].clone()
    step[:, 0] = 0
    u = float(keyed.uniform(seed, "threat", step))
    reached = (torch.ones(threats) if errors is None else errors).double().cumsum(0)
    return min(int((reached <= u * reached[-1]).sum()), threats - 1)


def _counts(model: nn.Module, row: Tensor) -> tuple[Tensor, Tensor]:
    """(misclassified, attacked) of each threat in all steps before that of a batch, [threats, 2], and what there is of its
    own step, [4], as the buffers have them."""
    errors, latest = getattr(model, ERRORS), getattr(model, LATEST)
    if int(latest[0]) == int(row[0, 1]):
        return errors, latest
    errors = errors.clone()
    errors[latest[1]] += latest[2:]
    errors[errors[:, 1] > MOST] //= 2  # their ratio is what counts
    return errors, torch.zeros_like(latest)


def _robust_errors(model: nn.Module, row: Tensor) -> Tensor | None:
    """The share of the images that each threat broke so far, [threats]; None where one has none yet, or all are harmless."""
    wrong, attacked = _counts(model, row)[0].T.cpu()
    return wrong / attacked if attacked.all() and wrong.any() else None


def _count(model: nn.Module, number: int, broken: Tensor, row: Tensor) -> None:
    """Add what came of the attacks of a threat. Collective in training, and only then."""
    if not bare(model).training:
        return
    errors, latest = _counts(model, row)
    found = torch.stack([broken.sum(), torch.ones_like(broken).sum()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found)
    getattr(model, ERRORS).copy_(errors)
    own = torch.cat([torch.tensor([int(row[0, 1]), number], device=found.device), latest[2:] + found])
    getattr(model, LATEST).copy_(own)


def _towards(u: Tensor) -> Loss:
    """Minus the cross-entropy with another class than the label, by uniform numbers [B]."""

    def loss(logits: Tensor, label: Tensor, _: Tensor) -> Tensor:
        others = logits.shape[1] - 1
        target = (u * others).long().clamp(max=others - 1)
        return -F.cross_entropy(logits, target + (target >= label), reduction="none")

    return loss


def _divergence(logits: Tensor, of: Tensor) -> Tensor:
    """KL(of ‖ softmax(logits)), [B]."""
    return F.kl_div(logits.log_softmax(1), of, reduction="none").sum(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, as the attacked model will be."""
    model = bare(model)  # DeepSpeed's engine itself is always in training
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
