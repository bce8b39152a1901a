"""What an adaptive test-time defence is worth, by the procedure of Croce et al. 2022 ("Evaluating the adversarial
robustness of adaptive test-time defenses", section 4): attacked in every way, and compared with the base under attack.
Each point that breaks the base counts against the defence too, so that only images which the defence rescues meet fewer
attacks than the base does.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rayproj.evaluation.proportions import sign_test
from rayproj.robustness.apgd import strongest
from rayproj.robustness.autoattack import AttackConfig, autoattack, ranked
from rayproj.robustness.defences import Defence
from rayproj.robustness.losses import Loss, cross_entropy, margin, target_alone, targeted
from rayproj.robustness.masking import WHOLE
from rayproj.robustness.oracle import Attacked, Model, Oracle
from rayproj.robustness.rays import rays
from rayproj.robustness.square import square
from rayproj.robustness.threats import Threat, wide

STATIC = ("clean", "static")  # columns of the base itself
ROUNDS = 3  # of a measured time


@dataclass
class AdaptiveConfig:
    """How hard is tried."""

    steps: int = 100  # of every ascent
    draws: int = 4  # of a random defence, for each gradient (EoT)
    votes: int = 5  # of a random defence: an image is right if more than half of so many answers are
    queries: int = 1000  # of the search by scores (a random defence answers each twice), and of that by decisions
    repeats: int = 3  # evaluations of a random defence, for the deviation
    # For the curves, each point of which costs three ascents:
    radii: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # of a threat; []: none
    defence_steps: list[int] = field(default_factory=list)  # of a defence that optimises, in place of its own

    def problems(self) -> list[str]:
        names = ("steps", "draws", "votes", "queries", "repeats")
        found = [f"adaptive.{name} must be positive." for name in names if getattr(self, name) <= 0]
        if any(radius <= 0 for radius in self.radii):
            found.append("adaptive.radii must be positive.")
        if any(steps <= 0 for steps in self.defence_steps):
            found.append("adaptive.defence_steps must be positive.")
        return found


@dataclass
class Verdict:
    """Whether each example is right after each attack.

    Attributes:
        correct: column -> bool [B]. "clean" and "static" are of the base: without an attack, and under AutoAttack.
            "defended" is the defence without an attack; the rest are attacks on it.
        images: fp32 [B, C, H, W]: of each example that an attack broke, what the first made of it; else as it was.
        queries: column of a search without gradients -> int64 [B]: what it asked until an example was broken; 0 of one that
            needed no attack, and -1 of one that stayed right.
    """

    correct: dict[str, Tensor]
    images: Tensor
    queries: dict[str, Tensor]

    @property
    def worst(self) -> Tensor:
        """bool [B]: right in every column of the defence."""
        return torch.stack([right for name, right in self.correct.items() if name not in STATIC]).all(0)


def evaluate(
    defence: Callable[[Model], Defence], base: Model, x: Tensor, label: Tensor, ids: Tensor, threat: Threat,
    attack: AttackConfig, config: AdaptiveConfig, seed: int = 0,
) -> Verdict:  # fmt: skip
    """Attack a defence.

    Args:
        defence: builds it around a base.
        x: fp32 [B, C, H, W] in [0, 1].
        label, ids: int64 [B]; ids are the keys of what is random.
        attack: of the static base.
    """
    defended = defence(base)
    votes = config.votes if defended.random else 1
    static = autoattack(base, x, label, ids, threat, attack, seed)
    correct = {"clean": base(x).argmax(1) == label, "static": static.robust.to(x.device)}
    correct["defended"] = right(defended, x, label, votes)
    found, broken, queries = x.clone(), ~correct["defended"], {}
    for name, attacks in _attacks(defended, base, x, label, ids, threat, config, seed, static.images):
        held = correct["defended"].clone()
        for one in attacks:
            assert threat.holds(x, one.images).all(), f"{name} left the ball"
            held &= right(defended, one.images, label, votes)
            found = torch.where(wide(~held & ~broken, x), one.images, found)
            broken |= ~held
            if one.queries is not None:
                asked = torch.where(correct["defended"], one.queries, 0)
                queries[name] = torch.where(held, -1, asked)
        correct[name] = held
    return Verdict(correct, found, queries)


def withstood(
    defence: Defence, base: Model, x: Tensor, label: Tensor, ids: Tensor, threat: Threat, config: AdaptiveConfig,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """bool [B]: right without an attack and under one ascent of the cross-entropy each of the base, of the defence and
    around it, for the points of a curve; arguments as of `evaluate`."""
    votes, draws = (config.votes, config.draws) if defence.random else (1, 1)
    found = right(defence, x, label, votes)
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 52)], 1)
    for oracle in (Oracle(base), Oracle(defence, draws), Oracle(defence.surrogate, draws)):
        tried = strongest(threat.norm)(oracle, x, label, row, threat, cross_entropy, config.steps, seed, go_on=True)
        found &= right(defence, tried.images, label, votes)
    return found


def shortened(defence: Defence) -> Defence:
    """The defence with half of its own steps, or as it is if it has none or one."""
    found = copy.copy(defence)
    found.steps = (defence.steps + 1) // 2
    return found


def right(model: Model, x: Tensor, label: Tensor, votes: int) -> Tensor:
    """bool [B]: taken for what it is in more than half of so many answers."""
    with torch.no_grad():
        answers = torch.stack([model(x).argmax(1) == label for _ in range(votes)])
    return answers.float().mean(0) > 0.5


def _attacks(
    defence: Defence, base: Model, x: Tensor, label: Tensor, ids: Tensor, threat: Threat, config: AdaptiveConfig, seed: int,
    static: Tensor,
) -> Iterator[tuple[str, list[Attacked]]]:  # fmt: skip
    """What was tried for each column."""
    logits, draws = base(x).detach(), config.draws if defence.random else 1
    to_second = targeted(logits.shape[1])

    def ascended(model: Model, loss: Loss, number: int, draws: int, go_on: bool = False) -> Attacked:
        row = torch.stack([ids, torch.full_like(ids, number), torch.full_like(ids, 50)], 1)
        target, oracle = ranked(logits, label, 1), Oracle(model, draws)
        # Of a random defence none leaves early: the first wrong answer may be luck, and votes decide.
        go_on = go_on or defence.random
        ascend = strongest(threat.norm)
        return ascend(oracle, x, label, row, threat, loss, config.steps, seed, target=target, go_on=go_on)

    # Of images that the base gets right all the same, the points of its highest loss.
    from_base = [ascended(base, loss, k, 1, True) for k, loss in enumerate((cross_entropy, to_second))]
    yield "transfer", [Attacked(static, torch.zeros_like(label, dtype=torch.bool)), *from_base]
    # From starts of their own, so that of a defence whose own gradient is all there is, or without steps, they are restarts.
    losses = (cross_entropy, margin, to_second)
    yield "direct", [ascended(defence, loss, k, draws) for k, loss in enumerate(losses)]
    around = [ascended(defence.surrogate, loss, k, draws) for k, loss in enumerate(losses, 4)]
    # Kang et al. 2021 is attacked so: by features, which are those of its base, like an image's of another class.
    yield "bpda", around + ([ascended(defence.likeness, target_alone, 7, 1, True)] if defence.likeness else [])
    yield "fewer", [ascended(shortened(defence).surrogate, margin, 3, draws)]
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 51)], 1)
    several, single = (Oracle(defence, n, defence.random, config.votes) for n in (draws, 1))
    yield "square", [square(several, x, label, row, threat, config.queries, seed)]
    yield "rays", [rays(single, x, label, threat, config.queries)]


class _Counted:
    """A model that counts the examples that go through it, forward and backward."""

    def __init__(self, model: Model) -> None:
        self.model, self.forwards, self.backwards = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        found = self.model(x)
        if found.requires_grad:
            found.register_hook(self._back)
        return found

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def deviation(defence: Defence, x: Tensor, label: Tensor, config: AdaptiveConfig) -> float:
    """Of the share of images that are right, over evaluations; 0 of a defence that draws nothing."""
    if not defence.random:
        return 0.0
    again = [right(defence, x, label, config.votes).float().mean() for _ in range(config.repeats)]
    return torch.stack(again).std(unbiased=False).item()


def passes(defence: Callable[[Model], Defence], base: Model, x: Tensor) -> tuple[float, float] | None:
    """Forward and backward passes through the base for one answer; None of a defence that does not call it as it is."""
    if not defence(base).calls_base:
        return None
    counted = _Counted(base)
    with torch.no_grad():
        defence(counted)(x)
    return counted.forwards / len(x), counted.backwards / len(x)


def seconds(models: Sequence[Model], x: Tensor) -> list[float]:
    """For an answer of each, per image: the median of some, after one that is not counted. They take turns, so that what
    else the machine does is equally in the way of all."""
    found: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for model, times in zip(models, found, strict=True):
                began = time.perf_counter()
                model(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) / len(x) for times in found]


@dataclass(frozen=True)
class Cost:
    """What an answer of a defence costs, measured on some images.

    Attributes:
        passes: forward and backward, through the base; None of a defence that has one of its own.
        seconds: of the base and of the defence, per image.
    """

    passes: tuple[float, float] | None
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Probe:
    """What some images say of a defence and of the attacks on it, for the checklist.

    Attributes:
        deviation: of the share of attacked images that are right, over evaluations.
        half, whole: share right under ascents around it of half the steps, and of all.
        unbounded: share right where the attack around it may go anywhere.
        apart: share of answers to images by themselves that are other than to all at once; None of a defence that draws.
        images: how many they are.
    """

    deviation: float
    half: float
    whole: float
    unbounded: float
    apart: float | None
    images: int


def probe(
    defence: Defence, x: Tensor, attacked: Tensor, label: Tensor, ids: Tensor, threat: Threat, config: AdaptiveConfig,
    seed: int = 0,
) -> Probe:  # fmt: skip
    """Arguments as of `evaluate`; `attacked` are images that it came to, fp32 [B, C, H, W]."""
    votes, draws = (config.votes, config.draws) if defence.random else (1, 1)
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 53)], 1)

    def left(steps: int, within: Threat) -> float:
        oracle = Oracle(defence.surrogate, draws)
        tried = strongest(threat.norm)(oracle, x, label, row, within, margin, steps, seed, go_on=True)
        return right(defence, tried.images, label, votes).float().mean().item()

    apart = None
    if not defence.random:
        with torch.no_grad():
            alone = torch.cat([defence(one[None]).argmax(1) for one in x])
            apart = (alone != defence(x).argmax(1)).float().mean().item()
    return Probe(
        deviation(defence, attacked, label, config), left((config.steps + 1) // 2, threat), left(config.steps, threat),
        left(config.steps, Threat(threat.norm, WHOLE[threat.norm])), apart, len(x),
    )  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One item of the checklist.

    Attributes:
        item: what is asked of an evaluation, or of the defence.
        passed: whether it holds.
        evidence: a sentence with the numbers.
    """

    item: str
    passed: bool
    evidence: str


def checklist(
    correct: Mapping[str, np.ndarray], probe: Probe, cost: Cost, curve: Sequence[tuple[float, float]],
    queries: Mapping[str, np.ndarray], config: AdaptiveConfig,
) -> list[Check]:  # fmt: skip
    """What Croce et al. 2022 (section 5) and Carlini et al. 2019 ("On evaluating adversarial robustness", section 5) ask of
    a defence and of its evaluation.

    Args:
        correct: the columns of a `Verdict`, over all examples.
        curve: radii and what is right there.
        queries: of the searches, as a `Verdict` has them.
    """
    steps, points = config.steps, sorted(curve)
    late = {c: float(np.mean(asked > config.queries / 2)) for c, asked in queries.items()}
    seconds, deviation = cost.seconds, probe.deviation
    share = {name: float(np.mean(right)) for name, right in correct.items()}
    worst = np.stack([right for name, right in correct.items() if name not in STATIC]).all(0)
    on_it = min(share["direct"], share["bpda"])
    held = [share["defended"], *(value for _, value in points)]
    better, worse = int((worst & ~correct["static"]).sum()), int((~worst & correct["static"]).sum())
    p = sign_test(better, worse, "greater")
    return [
        Check(
            "Attacks on the defence find more than those on its base do",
            on_it <= share["transfer"] + 0.01,
            f"{on_it:.1%} stay right under attacks on the defence itself, {share['transfer']:.1%} under those on its base.",
        ),
        Check(
            "Gradients find more than searches without them do",
            on_it <= min(share["square"], share["rays"]) + 0.01,
            f"{on_it:.1%} stay right under gradients, {share['square']:.1%} under a search by scores, {share['rays']:.1%} "
            "under one by decisions.",
        ),
        Check(
            "The gradient of the code is not masked",
            share["direct"] <= share["bpda"] + 0.02,
            f"{share['direct']:.1%} stay right where the code's own gradient is followed, {share['bpda']:.1%} around it.",
        ),
        Check(
            "A gradient through fewer of its steps finds no more",
            on_it <= share["fewer"] + 0.02,
            f"{share['fewer']:.1%} stay right around half of its own steps (from another start, if it has none or one), "
            f"{on_it:.1%} under gradients of all.",
        ),
        Check(
            "More steps of an attack find no more",
            probe.whole >= probe.half - 0.02,
            f"Of {probe.images} images {probe.half:.1%} stay right after {(steps + 1) // 2} steps of an attack, "
            f"{probe.whole:.1%} after {steps}.",
        ),
        Check(
            "More queries find no more",
            all(found <= 0.01 for found in late.values()),
            f"The second half of {config.queries} queries broke "
            f"{' and '.join(f'{found:.1%} ({name})' for name, found in late.items())} of the images.",
        ),
        Check(
            "A larger radius leaves fewer",
            bool(points) and all(after <= before + 0.01 for before, after in pairwise(held)),
            f"Right at radii of {', '.join(f'{radius:.3g}' for radius, _ in [(0.0, 0.0), *points])}: "
            f"{', '.join(f'{value:.1%}' for value in held)}."
            if points
            else "No radii were tried: adaptive.radii is empty.",
        ),
        Check(
            "An attack without a bound leaves none",
            probe.unbounded <= 0.02,
            f"Of {probe.images} images {probe.unbounded:.1%} stay right where an attack may go anywhere.",
        ),
        Check(
            "An answer depends on no other image",
            probe.apart == 0,
            f"Of {probe.images} images {probe.apart:.1%} are taken for something else when they come by themselves."
            if probe.apart is not None
            else "It draws for the images of a batch together.",
        ),
        Check(
            "It is no worse than its base without an attack",
            share["defended"] >= share["clean"] - 0.01,
            f"{share['defended']:.1%} are right with the defence, {share['clean']:.1%} without.",
        ),
        Check(
            "It is more robust than its base",
            p < 0.05,
            f"In the worst case {worst.mean():.1%} stay right, of the base {share['static']:.1%}: {better} images better, "
            f"{worse} worse (sign test, p = {p:.2g}).",
        ),
        Check(
            "Another evaluation would say the same",
            bool(deviation <= 0.01),
            f"Evaluated again the share of right images moved by {deviation:.2%} (standard deviation).",
        ),
        Check(
            "It costs less than ten times its base",
            seconds[1] < 10 * seconds[0],
            f"An answer takes {seconds[1] / max(seconds[0], 1e-12):.1f} times as long as the base's.",
        ),
    ]
