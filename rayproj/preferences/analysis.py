"""What pairwise ratings say: win rates, strengths on the Elo scale with intervals, agreement, and how to add one more model.

Strengths are those of Bradley and Terry (1952), P(i beats j) = 1 / (1 + exp(θ_j - θ_i)), by maximum likelihood, with
an "indifferent" as half a win of each; Elo = 1000 + 400 θ / ln 10, with a mean of 1000 over the models, as in Imagen
3's report (arXiv 2408.07009). Its printed matrices give its rankings; its Elo are spread wider than what is most likely
given these, by 3 to 35 %.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import optimize

MEAN, SCALE = 1000.0, 400 / math.log(10)
HALF = (
    0.5  # of a win to each side of every pair that met, as Jeffreys' prior gives: who always wins has a finite strength
)
NEIGHBOURS = 4  # better, and as many worse, that a new model meets (appendix D)


@dataclass(frozen=True)
class Games:
    """Comparisons of two models.

    Attributes:
        first, second: int [n], the models by their place in `models`.
        score: float [n], of the first: 1 preferred, 0.5 indifferent, 0 the other preferred.
        rater: int [n], from 0.
    """

    models: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    score: np.ndarray
    rater: np.ndarray

    def wins(self) -> np.ndarray:
        """float [M, M]: how often the model of the row was preferred to that of the column; indifference is half of each."""
        return self.by_rater().sum(0)

    def by_rater(self) -> np.ndarray:
        """`wins` of each rater, float [raters, M, M]."""
        count = len(self.models)
        found = np.zeros((int(self.rater.max(initial=-1)) + 1, count, count))
        np.add.at(found, (self.rater, self.first, self.second), self.score)
        np.add.at(found, (self.rater, self.second, self.first), 1 - self.score)
        return found

    def ties(self) -> np.ndarray:
        """float [M, M], symmetric: how often a pair left its raters indifferent."""
        found = np.zeros((len(self.models),) * 2)
        np.add.at(found, (self.first, self.second), self.score == 0.5)
        return found + found.T


def win_rates(wins: np.ndarray) -> np.ndarray:
    """Share of its comparisons with the column that the row won, float [M, M]; NaN where two never met."""
    met = wins + wins.T
    return np.divide(wins, met, out=np.full(met.shape, np.nan), where=met > 0)


def elo(theta: np.ndarray) -> np.ndarray:
    """Elo of strengths, [..., M], with a mean of 1000 over the models."""
    return MEAN + SCALE * (theta - theta.mean(-1, keepdims=True))


def connected(wins: np.ndarray) -> bool:
    """Whether all models met, if only by way of others: else their strengths are not on one scale."""
    reached, met = np.eye(len(wins))[0] > 0, (wins + wins.T) > 0
    for _ in wins:
        reached = reached | met[reached].any(0)
    return bool(reached.all())


def bradley_terry(wins: np.ndarray, prior: float = HALF, met: np.ndarray | None = None) -> np.ndarray:
    """Strengths θ by maximum likelihood (Newton), float [..., M], with a mean of 0.

    Args:
        wins: float [..., M, M]; leading dimensions are as many fits.
        prior: wins added to each side of every pair that met. At 0 a model that never lost has no finite strength.
        met: bool [M, M]; by default the pairs with a comparison.

    Raises:
        ValueError: some models never met the others, by whatever way.
    """
    wins = np.asarray(wins, np.float64)
    met = (wins + wins.swapaxes(-1, -2) > 0) if met is None else met
    if not connected(met.reshape(-1, *met.shape[-2:])[0].astype(float)):
        raise ValueError("Some models never met the others; they cannot be ranked together.")
    wins = wins + prior * met
    total, theta = wins + wins.swapaxes(-1, -2), np.zeros(wins.shape[:-1])
    won, identity = wins.sum(-1), np.eye(wins.shape[-1])
    for _ in range(100):
        p = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        gradient = won - (total * p).sum(-1)
        information = total * p * (1 - p)
        # The likelihood does not change along (1, ..., 1), which the constant fills in.
        hessian = information.sum(-1)[..., None] * identity - information + 1.0
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        theta = theta + np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    return theta - theta.mean(-1, keepdims=True)


def davidson(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, float]:
    """Strengths where indifference is an outcome of its own, and how common it is between equals (Davidson 1970).

    P(tie) = ν √(π_i π_j) / (π_i + π_j + ν √(π_i π_j)), P(i) = π_i / (the same), π = exp θ.

    Args:
        wins: float [M, M], with half of the ties, as of `Games.wins`.
        ties: float [M, M], symmetric.

    Returns:
        θ, float [M], with a mean of 0; and ν.
    """
    met = (wins + wins.T) > 0
    won = np.where(met, wins - ties / 2 + HALF, 0.0)
    first, second = np.triu_indices(len(wins), 1)

    def loss(x: np.ndarray) -> float:
        theta, log_nu = x[:-1], x[-1]
        a, b = theta[first], theta[second]
        parts = np.stack([a, b, log_nu + (a + b) / 2])
        total = np.logaddexp.reduce(parts, 0)
        counts = np.stack([won[first, second], won[second, first], ties[first, second]])
        return float((counts * (total - parts)).sum() + 1e-3 * theta.mean() ** 2)

    if not ties.any():
        return bradley_terry(wins), 0.0
    found = optimize.minimize(loss, np.zeros(len(wins) + 1), method="BFGS").x
    return found[:-1] - found[:-1].mean(), float(np.exp(found[-1]))


def bootstrap(
    games: Games, level: float = 0.99, replicates: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals of the models' Elo, float [M] each: percentiles over draws of as many raters, with
    replacement. Ratings of one rater stay together, since they are alike; with few raters (less than about twenty)
    the intervals are too narrow."""
    by_rater = games.by_rater()
    raters, count = len(by_rater), len(games.models)
    drawn = np.random.default_rng(seed).multinomial(raters, np.full(raters, 1 / raters), size=replicates)
    wins = (drawn.astype(float) @ by_rater.reshape(raters, -1)).reshape(replicates, count, count)
    total = by_rater.sum(0)
    found = elo(bradley_terry(wins, met=(total + total.T) > 0))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def krippendorff(units: Sequence[Sequence[float]], nominal: bool = False) -> float:
    """Krippendorff's α (2011): 1 perfect agreement, 0 that of chance. NaN where no unit has two values, or all are the same.

    Args:
        units: the values that raters gave of each thing that was rated.
        nominal: whether values are only equal or not; else their squared difference counts.
    """
    units = [unit for unit in units if len(unit) > 1]
    coincidences: dict[tuple[float, float], float] = defaultdict(float)
    for unit in units:
        for pair in permutations(unit, 2):
            coincidences[pair] += 1 / (len(unit) - 1)
    margin: Counter[float] = Counter()
    for (value, _), count in coincidences.items():
        margin[value] += count  # type: ignore[assignment]

    def apart(a: float, b: float) -> float:
        return float(a != b) if nominal else (a - b) ** 2

    observed = sum(count * apart(*pair) for pair, count in coincidences.items())
    by_chance = sum(margin[a] * margin[b] * apart(a, b) for a in margin for b in margin)
    return 1 - (sum(margin.values()) - 1) * observed / by_chance if by_chance else math.nan


def opponents(ratings: Mapping[str, float], model: str) -> list[str]:
    """Whom a new model is to meet: the best while it has met nobody, then the four models better and the four worse
    than what its Elo is so far (appendix D of the report). That is eight at most at a time, whatever the number of models
    is; who meets the best and then these meets nine at most, and some more if its Elo moves and it is asked again.

    Args:
        ratings: Elo by model, with that of the new one if it has any.
    """
    others = sorted((name for name in ratings if name != model), key=lambda name: -ratings[name])
    if model not in ratings:
        return others[:1]
    better = [name for name in others if ratings[name] >= ratings[model]]
    worse = [name for name in others if ratings[name] < ratings[model]]
    return better[-NEIGHBOURS:] + worse[:NEIGHBOURS]
