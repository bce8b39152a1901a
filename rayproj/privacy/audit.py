"""A one-run audit of the private training (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run",
arXiv 2305.08846), white-box.

A small model is trained through the real sampling, clipping, noise and update. Among its examples are canaries, each of
which a coin of its own has included or left out. The gradient of a canary lies in a coordinate of its own and is longer
than the clip norm, so what reaches the update of it is one clip norm, each time it is drawn. From the updates the auditor
guesses the coins. Whoever guesses more of them than (ε, δ) allows has refuted that the training is (ε, δ)-private.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayproj import keyed
from rayproj.engine.engine import Engine
from rayproj.engine.task import Batch
from rayproj.engine.training import Link, Recipe, TrainConfig, summary, train
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.privacy.ledger import epsilon_spent, secret_key, spent
from rayproj.privacy.plan import PrivacyConfig, PrivacyPlan, plan
from rayproj.privacy.sampling import PoissonSampling
from rayproj.privacy.step import PrivateStep
from rayproj.storage.store import Store, to_json

FEATURES = 8
CANARIES = "canaries.weight"  # the parameter that has a coordinate for each canary

# Shares of the canaries that are guessed to be in, by the highest scores, and out, by the lowest.
GUESSES = ((1 / 64, 1 / 64), (1 / 16, 1 / 16), (1 / 4, 1 / 4), (1 / 2, 1 / 2), (1 / 4, 0.0))

# What an auditor may look at: releases [T, m] to a score for each canary. The sum is the best under independent noise; what
# varies over the steps shows a canary under noise that they share.
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum of the updates": lambda releases: releases.sum(0),
    "variance of the updates": lambda releases: releases.var(0),
}


@dataclass
class AuditConfig:
    """What is hidden in the training, and how sure the bound is to be."""

    canaries: int = 2000  # a coin includes about half of them
    examples: int = 500  # ordinary ones, of a regression
    canary_norm: float = 10.0  # length of a canary's gradient in clip norms; clipping leaves one of them
    confidence: float = 0.95

    def problems(self) -> list[str]:
        found = [f"audit.{k} must be positive." for k in ("canaries", "examples") if getattr(self, k) <= 0]
        if self.canary_norm < 1:
            found.append("audit.canary_norm must be at least 1: a shorter canary shows less than ε allows.")
        return found if 0 < self.confidence < 1 else [*found, "audit.confidence must lie in (0, 1)."]


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on the probability that so many guesses are correct, if the mechanism is (ε, δ)-private (theorem 5.2).

    Each guess is right as often as ε-private randomized response is, with q = e^ε / (1 + e^ε); δ adds 2 m α δ, where
    α = max over i of P[correct > Binomial(guesses, q) >= correct - i] / i.

    Args:
        canaries: m, of which each was included by a fair coin.
        guesses: r, those that the auditor did not abstain from.
        correct: v of them.
    """
    assert 0 <= correct <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(scipy.stats.binom.sf(correct - 1, guesses, q))
    if not correct:
        return 1.0
    i = np.arange(1, correct + 1)
    alpha = float((np.cumsum(scipy.stats.binom.pmf(correct - i, guesses, q)) / i).max())
    return min(1.0, beta + 2 * canaries * alpha * delta)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The largest ε that so many correct guesses refute, with a probability of at most `error` of being wrong; 0: none."""

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < error

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Bound:
    """The best of the bounds that the guesses gave."""

    epsilon: float
    score: str
    guesses: int
    correct: int


def judge(releases: np.ndarray, included: np.ndarray, delta: float, confidence: float) -> Bound:
    """The lower bound on ε at δ that the releases give.

    Every score and share of guesses is a test of its own, at an error of (1 - confidence) / number of them (Bonferroni), so
    that the best may be taken.

    Args:
        releases: [T, m], the canaries' coordinates of the updates.
        included: bool [m], the coins.
    """
    canaries, found = len(included), []
    error = (1 - confidence) / (len(SCORES) * len(GUESSES))
    for name, score in SCORES.items():
        order = np.argsort(-score(releases), kind="stable")
        for top, bottom in GUESSES:
            is_in, is_out = order[: int(top * canaries)], order[canaries - int(bottom * canaries) :]
            correct = int(included[is_in].sum() + (~included[is_out]).sum())
            guesses = len(is_in) + len(is_out)
            found.append(Bound(lower_bound(canaries, guesses, correct, delta, error), name, guesses, correct))
    return max(found, key=lambda bound: bound.epsilon)


class AuditedModel(nn.Module):
    """A regression, and beside it a weight for each canary, which nothing else touches."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.GELU(), nn.Linear(16, 1))
        self.canaries = nn.Embedding(canaries, 1)

    def forward(self, x: Tensor, canary: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x)[:, 0], self.canaries(canary)[:, 0]


class AuditedTask:
    """The loss of a canary is its weight times what makes a gradient of `norm`: a Dirac canary."""

    starts_trained = False

    def __init__(self, canaries: int, norm: float, seed: int) -> None:
        self.count, self.norm, self.seed = canaries, norm, seed

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return AuditedModel(self.count)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        predicted, weight = model(batch["x"], batch["row"][:, 0].clamp(max=self.count - 1))
        fit = (predicted.float() - batch["x"].sum(1)).square()
        return torch.where(batch["row"][:, 0] < self.count, self.norm * weight.float(), fit)

    def preview(self, model: nn.Module) -> np.ndarray | None:
        return None


def coins(canaries: int, seed: int) -> np.ndarray:
    """bool [canaries]: which are included."""
    row = torch.zeros(canaries, 3, dtype=torch.int64)
    row[:, 0] = torch.arange(canaries)
    return (keyed.uniform(seed, "canary", row) < 0.5).numpy()


class AuditedBatches:
    """The examples are the canaries, then the ordinary ones. The sampling draws of all of them, and what was not included
    is left out of its draw: of those that are included, that is a Poisson sample."""

    def __init__(self, sampling: PoissonSampling, included: np.ndarray, seed: int, world: World) -> None:
        self.sampling, self.seed, self.world = sampling, seed, world
        self.there = np.concatenate([included, np.ones(sampling.num_samples - len(included), bool)])

    def at(self, step: int) -> Batch:
        drawn = self.sampling.indices(step)
        mine = np.array_split(drawn[self.there[drawn]], self.world.world_size)[self.world.rank]
        index = torch.from_numpy(mine)
        row = torch.stack([index, torch.full_like(index, step), torch.zeros_like(index)], dim=1)
        return {"x": keyed.normal(self.seed, "x", row * torch.tensor([1, 0, 0]), (FEATURES,)), "row": row}


class AuditedStep(PrivateStep):
    """The private step, with somebody who looks on: it keeps what is released of the canaries' coordinates in
    `releases/`, in clip norms."""

    watched = False

    def prepare(self, engine: Engine) -> None:
        super().prepare(engine)
        self.watched = True  # the self-test is no release

    def privatise(self, engine: Engine, share: Tensor, step: int) -> Tensor:
        released = super().privatise(engine, share, step)
        if not self.watched:
            return released
        flat = torch.zeros(sum(engine.sizes.values()), device=released.device)
        for run in engine.runs():
            flat[run.start : run.start + run.length] = released[run.offset : run.offset + run.length]
        dist.all_reduce(flat, group=engine.group)
        if engine.world.rank == 0:
            names = list(engine.sizes)
            begin = sum(engine.sizes[name] for name in names[: names.index(CANARIES)])
            seen = (
                flat[begin : begin + engine.sizes[CANARIES]].cpu().numpy() * self.plan.normaliser / self.plan.clip_norm
            )
            content = io.BytesIO()
            np.save(content, seen)
            self.store.put_once(f"releases/{step:08d}-{self.ledger.start:08d}.npy", content.getvalue())
        return released


def audited_plan(config: AuditConfig, privacy: PrivacyConfig, steps: int) -> PrivacyPlan:
    """The mechanism over the canaries, included or not, and the ordinary examples."""
    return plan(privacy, config.canaries + config.examples, steps)


def audit(
    config: AuditConfig, privacy: PrivacyConfig, settings: TrainConfig, seed: int, world: World, store: Store, link: Link
) -> dict[str, Any]:  # fmt: skip
    """Train with canaries, and bound ε from below. Collective.

    Args:
        seed: of the coins and of the data; the mechanism has a secret key as always.

    Returns:
        On rank 0 the outcome, which is also in `audit.json`, with a picture in `audit.png`.
    """
    mechanism = audited_plan(config, privacy, settings.steps)
    settings.steps = mechanism.steps
    key, included = secret_key(store), coins(config.canaries, seed)
    sampling = PoissonSampling(mechanism.num_samples, mechanism.sample_rate, key, mechanism.max_batch)
    task = AuditedTask(config.canaries, config.canary_norm * mechanism.clip_norm, seed)
    step = AuditedStep(mechanism, key, store, privacy.chunk)
    engine = train(Recipe(task, step, AuditedBatches(sampling, included, seed, world), settings), world, store, link)
    if world.rank != 0:
        return {}
    releases = np.stack([np.load(io.BytesIO(store.read(path))) for path in store.list("releases")])
    bound = judge(releases, included, mechanism.delta, config.confidence)
    records = spent(store)
    claimed = epsilon_spent(records, mechanism.delta)
    found = {
        "epsilon_claimed": claimed,
        "epsilon_lower": bound.epsilon,
        "sound": bound.epsilon <= claimed,
        "delta": mechanism.delta,
        "confidence": config.confidence,
        "canaries": config.canaries,
        "included": int(included.sum()),
        "tests": len(SCORES) * len(GUESSES),
        "best": asdict(bound),
        "privacy": {**mechanism.describe(), "epsilon": claimed, "releases": len(records)},
        **summary(engine, world),
    }
    store.write("audit.json", to_json(found))
    store.write("audit.png", picture(releases, included, bound, claimed, config.confidence))
    return found


def sentence(found: dict[str, Any]) -> str:
    """The outcome of an audit, for a person."""
    best, confidence = found["best"], f"{100 * found['confidence']:g} %"
    return (
        f"ε is at least {found['epsilon_lower']:.3f} with {confidence} confidence, and claimed to be at most "
        f"{found['epsilon_claimed']:.3f}, at δ = {found['delta']:g}: {best['correct']:,} of {best['guesses']:,} guesses "
        f"were right, by the {best['score']}, of {found['canaries']:,} canaries."
    )


def require_sound(found: dict[str, Any]) -> dict[str, Any]:
    """The outcome of an audit, if it does not refute the claim.

    Raises:
        UserError: it does.
    """
    if not found["sound"]:
        raise UserError(
            f"The audit refutes the claim: {sentence(found)} Do not release what was trained by this code or configuration "
            "until the cause is found; audit.png shows the scores."
        )
    return found


def picture(releases: np.ndarray, included: np.ndarray, bound: Bound, claimed: float, confidence: float) -> bytes:
    """PNG: the scores of the canaries that were in and out, and the bound beside the claim."""
    from matplotlib.figure import Figure

    scores = SCORES[bound.score](releases)
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    bins = np.linspace(scores.min(), scores.max(), 60)
    for mask, name, colour in ((~included, "left out", "#7a869a"), (included, "included", "#c8553d")):
        left.hist(scores[mask], bins, alpha=0.6, color=colour, label=f"{name} ({mask.sum():,})")
    left.set(xlabel=f"score: {bound.score}, in clip norms", ylabel="canaries")
    left.legend(frameon=False)
    values = {f"audit, at least\n({100 * confidence:g} % confidence)": bound.epsilon, "claim, at most": claimed}
    right.bar(list(values), list(values.values()), color=["#c8553d", "#2a9d8f"], width=0.6)
    for i, value in enumerate(values.values()):
        right.text(i, value, f"{value:.2f}", ha="center", va="bottom")
    right.set(ylabel="ε")
    right.margins(y=0.15)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, facecolor="white")
    return content.getvalue()
