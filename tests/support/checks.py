"""What must hold of private training, as functions that raise where it does not. The ordinary tests call them, and
`tests/privacy/test_mutations.py` shows of each that it fails on the faults that it is there for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from rayproj.engine.engine import Engine
from rayproj.engine.world import World
from rayproj.privacy import audit, clipping, ledger
from rayproj.privacy import step as step_module
from rayproj.privacy.audit import AuditConfig
from rayproj.privacy.clipping import clipped_sum
from rayproj.privacy.plan import ClippingPath, PrivacyConfig
from rayproj.privacy.sampling import PoissonSampling
from rayproj.privacy.step import PrivateStep
from rayproj.storage.store import Store
from tests.support import private, regression
from tests.support.private import KEY


def noise_is_gaussian(draw: Callable[..., Tensor]) -> None:
    """Standard, and every coordinate its own."""
    found = draw(KEY, 3, 0, range(0, 200_001)).double()
    assert found.shape == (200_001,)
    # fp32 has few distinct values near zero.
    assert len(found.unique()) > 0.98 * len(found), "the noise is not Gaussian: coordinates share it"
    assert stats.kstest(found.numpy(), "norm").pvalue > 1e-3, "the noise is not Gaussian"
    assert abs(stats.kurtosis(found.numpy())) < 5 * math.sqrt(24 / len(found)), "the noise is not Gaussian"
    assert abs(found.var() - 1) < 5 * math.sqrt(2 / len(found)), "the noise is not Gaussian"


def noises_are_independent(draw: Callable[..., Tensor], *others: Tensor) -> None:
    """Of steps, starts, keys and intervals; and of 100,000 others."""
    n = 100_000
    draws = [
        draw(KEY, 2, 0, range(n)),
        draw(KEY, 3, 0, range(n)),
        draw(KEY, 4, 0, range(n)),
        draw(KEY, 3, 1, range(n)),
        draw(KEY, 2**32 - 1, 0, range(n)),
        draw(KEY[::-1], 3, 0, range(n)),
        draw(KEY[:8] + bytes(8), 3, 0, range(n)),
        draw(KEY, 3, 0, range(n, 2 * n)),
        *others,
    ]
    correlation = np.corrcoef(torch.stack(draws).double().numpy()) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / math.sqrt(n), "two noises are not independent"


def inclusion_is_poisson() -> None:
    """Each example in each step with probability q, independently of the others and of other steps."""
    sampling, steps = PoissonSampling(200, 0.1, KEY), 3000
    taken = np.zeros((steps, 200))
    for step in range(steps):
        indices = sampling.indices(step)
        assert np.array_equal(indices, np.unique(indices))
        taken[step, indices] = 1
    z = (taken.mean(0) - 0.1) / math.sqrt(0.09 / steps)
    assert stats.kstest(z, "norm").pvalue > 1e-3, "not Poisson: how often the examples take part"
    sizes = taken.sum(1)
    assert abs(sizes.mean() - 20) < 5 * math.sqrt(18 / steps), "not Poisson: the mean size of a batch"
    assert abs(sizes.var() / 18 - 1) < 5 * math.sqrt(2 / steps), "not Poisson: the variance of a batch's size"
    correlation = np.corrcoef(taken[:, :40].T) - np.eye(40)
    assert np.abs(correlation).max() < 5 / math.sqrt(steps), "not Poisson: examples depend on each other"
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 5 / math.sqrt(steps), (
        "not Poisson: steps depend on each other"
    )


def bookkeeping_is_trusted() -> None:
    """What its trial against a loop says of a model that it covers, of whose weights it holds some gradients, and of some
    Gram matrices. Whatever the trial says, the sum is that of a loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(2), nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 96))
    batch = {"row": torch.zeros(5, 3, dtype=torch.int64), "x": torch.randn(5, 3, 6, 6)}

    def losses(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return 1e-3 * m(b["x"]).square().sum((1, 2))

    arguments = model, losses, list(model.named_parameters()), batch, 1, 1e-3
    expected, _, norms = clipped_sum(*arguments, chunk=1, path=ClippingPath.materialise)
    assert norms.max() < 1, "none would be clipped at 1"
    found, _, _ = clipped_sum(*arguments, chunk=5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    assert set(clipping._choices[model].values()) <= {ClippingPath.bookkeeping, ClippingPath.two_pass}, (
        "clipping went the slow way"
    )


def a_release_that_is_done_again_is_charged_again(uri: str) -> None:
    """By the next start of a run that died."""
    store, plan = Store(uri), private.mechanism(5)
    for _ in range(2):
        ledger.Ledger(store, plan, KEY, ledger.next_start(store)).charge(0)
    assert ledger.epsilon_spent(ledger.spent(store), plan.delta) > plan.epsilon(1), "two releases are charged as one"


def training_equals_dp_sgd_written_out(world: World, uri: str, stages: tuple[int, ...] = (2,)) -> None:
    """At these ZeRO stages, in weights and in ε."""
    expected = private.written_out(4)
    for stage in stages:
        found = private.run(world, f"{uri}/{stage}", private.settings(4, stage), "a")
        for name, tensor in expected.items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-5, atol=1e-6)
        assert found["epsilon"] == pytest.approx(private.mechanism(4).epsilon())


def noise_is_drawn_for_what_is_on_record(world: World, uri: str) -> None:
    """And for nothing else, on any rank."""
    privatise, steps, on_record = PrivateStep.privatise, 3, []

    def watched(self: PrivateStep, engine: Engine, share: Tensor, step: int) -> Tensor:
        if step < steps:  # else it is the self-test's
            records = ledger.spent(self.store)
            on_record.append((step, self.ledger.start) in {(r["step"], r["start"]) for r in records})
        return privatise(self, engine, share, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateStep, "privatise", watched)
        private.run(world, uri, private.settings(steps), "a")
    assert on_record == [True] * steps, "noise was drawn for a release that is not on record"


def the_start_is_not_refused(world: World, uri: str) -> None:
    """By the self-test; what it refuses releases nothing."""
    try:
        private.run(world, uri, private.settings(1), "a")
    except RuntimeError:
        assert Store(uri).list("ledger") == []
        raise


AUDIT = AuditConfig(canaries=1600, examples=400)
CLAIM = 2.0


def the_audit_does_not_refute(world: World, uri: str) -> None:
    """The self-test, which sees some faults, is turned off: the audit is to see them by itself."""
    privacy = PrivacyConfig(epsilon=CLAIM, delta=1e-5, expected_batch=400, chunk=64)
    settings, link = private.settings(30), regression.Recorder("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "secret_key", lambda store: KEY)
        patch.setattr(step_module, "self_test", lambda *_: None)
        found = audit.audit(AUDIT, privacy, settings, 1, world, Store(uri), link)
    assert found["privacy"]["releases"] == 30 and 1.9 < found["epsilon_claimed"] <= CLAIM
    assert audit.require_sound(found) is found
    assert found["epsilon_lower"] > 0.1, "an audit that sees nothing would show nothing"
