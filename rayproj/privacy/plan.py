"""The privacy plan: one frozen object that alone holds what sampling, clipping, noise and accounting must agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from rayproj.errors import UserError
from rayproj.privacy import accounting


@dataclass
class PrivacyConfig:
    """What the user asks for; give `epsilon` or `noise_multiplier`, the other follows."""

    epsilon: float | None = None
    delta: float = 1e-5  # less than one over the number of private examples
    noise_multiplier: float | None = None
    expected_batch: int = 256  # mean size of a Poisson batch
    clip_norm: float = 1.0  # bound on the norm of one example's gradient
    multiplicity: int = 1  # K views of an example (noise, time, dropped label) averaged before clipping
    chunk: int = 8  # examples whose gradients are held at once; a matter of memory and speed alone
    unsafe_metrics: bool = False  # report losses and previews, which are private outputs that no ε covers

    def problems(self) -> list[str]:
        found = []
        if (self.epsilon is None) == (self.noise_multiplier is None):
            found.append("Give exactly one of privacy.epsilon and privacy.noise_multiplier.")
        for name in ("epsilon", "noise_multiplier", "expected_batch", "clip_norm", "multiplicity", "chunk"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"privacy.{name} must be positive, not {value}.")
        return found if 0 < self.delta < 1 else [*found, f"privacy.delta must lie in (0, 1), not {self.delta}."]


@dataclass(frozen=True)
class PrivacyPlan:
    """A Poisson-subsampled Gaussian mechanism, repeated `steps` times, under add-or-remove-one neighbours.

    Each update releases (sum of clipped gradients + N(0, (noise_multiplier * clip_norm)^2 I)) / normaliser, where each of
    the `num_samples` examples takes part with probability `sample_rate`, independently.
    """

    num_samples: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    delta: float
    multiplicity: int
    normaliser: float  # public: the expected batch, never the drawn one
    relation: str = "ADD_OR_REMOVE_ONE"

    @property
    def sensitivity(self) -> float:
        """L2 change of the clipped sum when one example is added or removed: it contributes at most the clip norm."""
        return self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum."""
        return self.noise_multiplier * self.sensitivity

    def epsilon(self, steps: int | None = None) -> float:
        """ε at the plan's δ after so many updates, all by default."""
        return accounting.epsilon(
            self.sample_rate, self.noise_multiplier, self.steps if steps is None else steps, self.delta
        )

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
    """Fix the mechanism.

    Raises:
        UserError: more expected examples in a batch than there are, or δ too large to mean anything.
    """
    if config.expected_batch > num_samples:
        raise UserError(
            f"privacy.expected_batch={config.expected_batch} exceeds the {num_samples} private examples; lower it."
        )
    if config.delta >= 1 / num_samples:
        raise UserError(
            f"privacy.delta={config.delta} is not below 1/{num_samples}, so it would allow the release of one example "
            f"outright; use at most {0.1 / num_samples:.1g}."
        )
    rate = config.expected_batch / num_samples
    sigma = config.noise_multiplier
    if sigma is None:
        assert config.epsilon is not None
        sigma = accounting.noise_multiplier(config.epsilon, rate, steps, config.delta)
    return PrivacyPlan(
        num_samples=num_samples,
        sample_rate=rate,
        noise_multiplier=sigma,
        clip_norm=config.clip_norm,
        steps=steps,
        delta=config.delta,
        multiplicity=config.multiplicity,
        normaliser=float(config.expected_batch),
    )
