"""The privacy plan: one frozen object that alone holds what sampling, clipping, noise and accounting must agree on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rayproj.errors import UserError
from rayproj.privacy import accounting


class ClippingPath(Enum):
    """How the examples' gradients are clipped; all ways give the same numbers, to rounding."""

    # Book-keeping where it covers the model and, tried on two examples, gives what a loop gives; in two passes if that,
    # timed on the first batch, is faster.
    auto = "auto"
    bookkeeping = "bookkeeping"  # one backward; inputs and output gradients are held until the clip factors are known
    two_pass = "two_pass"  # a backward for the norms, and one of the weighted losses: slower, and holds hardly less
    materialise = "materialise"  # a backward for each example or, if chunk > 1, vmap


@dataclass
class PrivacyConfig:
    """What the user asks for. Of `epsilon`, `noise_multiplier`, `expected_batch` and `train.steps` any three fix the fourth:
    leave out one of the first two, or give both and set one of the others to 0."""

    epsilon: float | None = None
    delta: float = 1e-5  # less than one over the number of private examples
    noise_multiplier: float | None = None
    expected_batch: int = 256  # mean size of a Poisson batch; 0: the largest that the others allow
    # No batch is larger: of more examples as many take part as it says. Costs some of δ; 0: no bound. Either way a step
    # holds the gradients of `chunk` examples at once, so that this bounds the time of a step and not its memory.
    max_batch: int = 0
    clip_norm: float = 1.0  # bound on the norm of one example's gradient
    multiplicity: int = 1  # K views of an example (noise, time, dropped label) averaged before clipping
    chunk: int = 8  # examples whose gradients are held at once; a matter of memory and speed alone
    path: ClippingPath = ClippingPath.auto  # how they are clipped; the same
    # Noise of AES-256 in counter mode, drawn on the host, for adversaries who could break Philox; slower.
    secure_noise: bool = False
    unsafe_metrics: bool = False  # report losses and previews, which are private outputs that no ε covers

    def problems(self) -> list[str]:
        found = []
        if self.epsilon is None and self.noise_multiplier is None:
            found.append("Give privacy.epsilon or privacy.noise_multiplier; the other follows.")
        for name in ("epsilon", "noise_multiplier", "clip_norm", "multiplicity", "chunk"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"privacy.{name} must be positive, not {value}.")
        found += [f"privacy.{n} must not be negative." for n in ("expected_batch", "max_batch") if getattr(self, n) < 0]
        return found if 0 < self.delta < 1 else [*found, f"privacy.delta must lie in (0, 1), not {self.delta}."]


@dataclass(frozen=True)
class PrivacyPlan:
    """A Poisson-subsampled Gaussian mechanism, repeated `steps` times, under add-or-remove-one neighbours.

    Each update releases (sum of clipped gradients + N(0, (noise_multiplier * clip_norm)^2 I)) / normaliser, where each of
    the `num_samples` examples takes part with probability `sample_rate`, independently; of more than `max_batch`, if that
    is not 0, a random `max_batch` take part.

    The bound is met with a small probability, which `accounting.epsilon_of` charges to δ.
    """

    num_samples: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    delta: float
    multiplicity: int
    normaliser: float  # public: the expected batch, never the drawn one
    max_batch: int = 0
    secure_noise: bool = False  # the generator of the noise; no matter to the accounting, much to what it stands on
    relation: str = "ADD_OR_REMOVE_ONE"

    @property
    def sensitivity(self) -> float:
        """L2 change of the clipped sum when one example is added or removed: it contributes at most the clip norm."""
        return self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def overflow(self) -> float:
        """The probability that more than `max_batch` examples would take part in a step."""
        from scipy.stats import binom

        return float(binom.sf(self.max_batch, self.num_samples, self.sample_rate)) if self.max_batch else 0.0

    def epsilon(self, steps: int | None = None) -> float:
        """ε at the plan's δ after so many updates, all by default."""
        steps = self.steps if steps is None else steps
        return accounting.epsilon(self.sample_rate, self.noise_multiplier, steps, self.delta, steps * self.overflow)

    def event(self) -> Any:
        """The whole mechanism as dp-accounting's DpEvent, for any accountant or auditor."""
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

        update = PoissonSampledDpEvent(self.sample_rate, GaussianDpEvent(self.noise_multiplier))
        return SelfComposedDpEvent(update, self.steps)

    def digest(self) -> str:
        """Identifies the mechanism in the ledger."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What a report or a certificate says of it."""
        return {**asdict(self), "accountant": "dp-accounting PLD", "digest": self.digest()}


def plan(config: PrivacyConfig, num_samples: int, steps: int) -> PrivacyPlan:
    """Fix the mechanism, solving for what was left open.

    Args:
        steps: updates; 0: as many as the rest of the config allows.

    Raises:
        UserError: too much or too little is given, nothing that is sought gives the ε, more expected examples in a batch
            than there are, δ too large to mean anything, or a bound on the batch that would cost too much of it.
    """
    epsilon, sigma, batch = config.epsilon, config.noise_multiplier, config.expected_batch
    given = sum(map(bool, (epsilon, sigma, batch, steps)))
    if given != 3:
        raise UserError(
            "Of privacy.epsilon, privacy.noise_multiplier, privacy.expected_batch and train.steps three must be given, and "
            f"the fourth follows; {given} are. Leave out one of the first two, or set one of the others to 0."
        )
    if batch > num_samples:
        raise UserError(f"privacy.expected_batch={batch} exceeds the {num_samples} private examples; lower it.")
    if config.delta >= 1 / num_samples:
        raise UserError(
            f"privacy.delta={config.delta} is not below 1/{num_samples}, so it would allow the release of one example "
            f"outright; use at most {0.1 / num_samples:.1g}."
        )

    def made(batch: int, steps: int, sigma: float) -> PrivacyPlan:
        return PrivacyPlan(
            num_samples=num_samples,
            sample_rate=batch / num_samples,
            noise_multiplier=sigma,
            clip_norm=config.clip_norm,
            steps=steps,
            delta=config.delta,
            multiplicity=config.multiplicity,
            normaliser=float(batch),
            max_batch=config.max_batch,
            secure_noise=config.secure_noise,
        )

    if batch and steps:
        _refuse_a_bound_that_costs_too_much(made(batch, steps, 1e3))
    if epsilon is None:
        assert sigma is not None
        found = made(batch, steps, sigma)
    elif sigma is None:
        found = made(batch, steps, _least_noise(epsilon, made(batch, steps, 1.0)))
    elif not batch:
        found = made(_largest(lambda b: made(b, steps, sigma).epsilon(), epsilon, num_samples), steps, sigma)
    else:
        found = made(batch, _largest(lambda n: made(batch, n, sigma).epsilon(), epsilon, 10**7), sigma)
    return found


def _refuse_a_bound_that_costs_too_much(with_much_noise: PrivacyPlan) -> None:
    if not math.isfinite(with_much_noise.epsilon()):
        raise UserError(
            f"privacy.max_batch={with_much_noise.max_batch} would be met with a probability of "
            f"{with_much_noise.steps * with_much_noise.overflow:.1g}, which δ={with_much_noise.delta:g} does not cover; "
            "raise it, or set it to 0."
        )


def _least_noise(target: float, p: PrivacyPlan) -> float:
    return accounting.noise_multiplier(target, p.sample_rate, p.steps, p.delta, p.steps * p.overflow)


def _largest(epsilon: Callable[[int], float], target: float, most: int) -> int:
    """The largest whole number, up to `most`, whose ε does not exceed the target.

    Raises:
        UserError: not even 1 does not.
    """
    if epsilon(1) > target:
        raise UserError(
            f"Even a single update, or a batch of one example, exceeds ε={target}; raise the noise multiplier."
        )
    low, high = 1, 2
    while high <= most and epsilon(high) <= target:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon(middle) <= target else (low, middle)
    return low
