"""AutoAttack: an ensemble of attacks, each on the examples that those before it left (Croce and Hein 2020, "Reliable
evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from rayproj.robustness.apgd import strongest
from rayproj.robustness.fab import fab
from rayproj.robustness.losses import Loss, cross_entropy, targeted, untargeted
from rayproj.robustness.oracle import Attacked, Model, Oracle
from rayproj.robustness.pgd import fgsm, pgd
from rayproj.robustness.rays import rays
from rayproj.robustness.square import square
from rayproj.robustness.threats import Norm, Threat

CLEAN = "clean"  # misclassified without an attack


class Attack(Enum):
    apgd_ce = "apgd_ce"
    apgd_dlr = "apgd_dlr"
    apgd_t = "apgd_t"  # towards each of the likeliest other classes
    fab_t = "fab_t"
    square = "square"
    # Not part of the standard ensemble:
    rays = "rays"  # by decisions alone
    fgsm = "fgsm"
    pgd = "pgd"


STANDARD = (Attack.apgd_ce, Attack.apgd_t, Attack.fab_t, Attack.square)


@dataclass
class AttackConfig:
    """How hard is tried; the defaults are those of the standard AutoAttack."""

    attacks: list[Attack] = field(default_factory=lambda: list(STANDARD))
    steps: int = 100  # of APGD, FAB and PGD
    restarts: int = 1  # of PGD and of APGD on the cross-entropy (for l1 at least five)
    targets: int = 9  # classes that targeted attacks try (APGD for l1 five)
    queries: int = 5000  # of the square attack and of RayS
    draws: int = (
        1  # of a random model for each answer (EoT); the usual ensemble for one is apgd_ce and apgd_dlr with 20
    )

    def problems(self) -> list[str]:
        names = ("steps", "restarts", "targets", "queries", "draws")
        found = [f"attack.{name} must be positive." for name in names if getattr(self, name) <= 0]
        return found if self.attacks else [*found, "attack.attacks is empty."]


@dataclass
class Evaluated:
    """The worst that was found for each example.

    Attributes:
        images: fp32 [B, C, H, W]: misclassified where `by` says so, else as they were.
        by: the first attack that broke each example, `CLEAN`, or "" where none did.
        forwards, backwards: examples that went through the model.
    """

    images: Tensor
    by: list[str]
    forwards: int
    backwards: int

    @property
    def robust(self) -> Tensor:
        """bool [B]."""
        return torch.tensor([name == "" for name in self.by])


def autoattack(
    model: Model,
    x: Tensor,
    label: Tensor,
    ids: Tensor,
    threat: Threat,
    config: AttackConfig | None = None,
    seed: int = 0,
) -> Evaluated:
    """Attack a model in every way that the config names.

    Args:
        model: in evaluation mode; its own normalisation is its business.
        x: fp32 [B, C, H, W] in [0, 1].
        label: int64 [B].
        ids: int64 [B]: numbers of the examples, by which all that is random is keyed, so that the result for one does not
            depend on the others nor on who attacks it.
    """
    config = config or AttackConfig()
    oracle = Oracle(model, config.draws)
    logits = oracle.logits(x)
    found, by = x.clone(), [""] * len(x)
    robust = torch.nonzero(logits.argmax(1) == label)[:, 0]
    for i in set(range(len(x))) - set(robust.tolist()):
        by[i] = CLEAN
    for kind in config.attacks:
        for attack in _runs(kind, config, threat, logits, seed):
            if not len(robust):
                break
            one = attack(oracle, x[robust], label[robust], ids[robust], logits[robust])
            # Nobody's word is taken for it: what lies outside the ball, or is classified well after all, did not break it.
            valid = threat.holds(x[robust], one.images)
            valid &= oracle.logits(one.images).argmax(1) != label[robust]
            broken = robust[one.broken & valid]
            found[broken] = one.images[one.broken & valid]
            for i in broken.tolist():
                by[i] = kind.value
            robust = robust[~(one.broken & valid)]
    return Evaluated(found, by, oracle.forwards, oracle.backwards)


Run = Callable[[Oracle, Tensor, Tensor, Tensor, Tensor], Attacked]
"""(oracle, x, label, ids, clean logits) to what came of it."""


def _runs(kind: Attack, config: AttackConfig, threat: Threat, logits: Tensor, seed: int) -> Iterator[Run]:
    """The restarts and targets of an attack."""
    number, classes = list(Attack).index(kind), logits.shape[1]
    ascend, l1 = strongest(threat.norm), threat.norm is Norm.l1
    if kind in (Attack.apgd_ce, Attack.apgd_dlr):
        loss = cross_entropy if kind is Attack.apgd_ce else untargeted(classes)
        for restart in range(max(5, config.restarts) if l1 else config.restarts):
            yield _ascent(ascend, threat, loss, config.steps, seed, number, restart, None)
    elif kind is Attack.apgd_t:
        for rank in range(1, min(5 if l1 else config.targets, config.targets, classes - 1) + 1):
            yield _ascent(ascend, threat, targeted(classes), config.steps, seed, number, rank, rank)
    elif kind is Attack.fab_t:
        for rank in range(1, min(config.targets, classes - 1) + 1):
            yield _boundary(threat, config.steps, rank)
    elif kind is Attack.square:
        yield _search(threat, config.queries, seed, number)
    elif kind is Attack.rays:
        yield lambda oracle, x, label, ids, logits: rays(oracle, x, label, threat, config.queries)
    elif kind is Attack.fgsm:
        yield lambda oracle, x, label, ids, logits: fgsm(oracle, x, label, threat)
    else:
        for restart in range(config.restarts):
            yield _projected(threat, config.steps, seed, number, restart)


def _ascent(
    ascend: Callable[..., Attacked],
    threat: Threat,
    loss: Loss,
    steps: int,
    seed: int,
    number: int,
    restart: int,
    rank: int | None,
) -> Run:
    def run(oracle: Oracle, x: Tensor, label: Tensor, ids: Tensor, logits: Tensor) -> Attacked:
        target = None if rank is None else ranked(logits, label, rank)
        return ascend(oracle, x, label, _row(ids, restart, number), threat, loss, steps, seed, target=target)

    return run


def _projected(threat: Threat, steps: int, seed: int, number: int, restart: int) -> Run:
    """PGD with steps of 2.5 radii over their number, which get from any point to any other (Madry et al. 2018)."""

    def run(oracle: Oracle, x: Tensor, label: Tensor, ids: Tensor, logits: Tensor) -> Attacked:
        step = min(1.0, 2.5 / steps)
        return pgd(oracle, x, label, _row(ids, restart, number), threat, steps, step, seed=seed, go_on=False)

    return run


def _boundary(threat: Threat, steps: int, rank: int) -> Run:
    return lambda oracle, x, label, ids, logits: fab(oracle, x, label, ranked(logits, label, rank), threat, steps)


def _search(threat: Threat, queries: int, seed: int, number: int) -> Run:
    return lambda oracle, x, label, ids, logits: square(oracle, x, label, _row(ids, number, 0), threat, queries, seed)


def ranked(logits: Tensor, label: Tensor, rank: int) -> Tensor:
    """The `rank`-th likeliest class other than the label, [B]."""
    return logits.scatter(1, label[:, None], -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, rank - 1]


def _row(ids: Tensor, restart: int, number: int) -> Tensor:
    return torch.stack([ids, torch.full_like(ids, restart), torch.full_like(ids, number)], 1)
