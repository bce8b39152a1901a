"""The audit: its bound against the paper's own code, closed forms and mechanisms that reach it; and what it looks at. (What
it says of the real private step, sound and broken, is in `test_mutations`.)"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rayproj.engine.world import World
from rayproj.privacy import audit
from rayproj.privacy.audit import AuditConfig, lower_bound, p_value
from rayproj.privacy.plan import PrivacyConfig
from rayproj.storage.store import Store
from tests.support import private, regression
from tests.support.commands import ROOT, run
from tests.support.ranks import run_ranks


def p_value_of_the_paper(m: int, r: int, v: int, eps: float, delta: float) -> float:
    """Steinke, Nasr and Jagielski 2023, appendix D, as it stands there."""
    q = 1 / (1 + math.exp(-eps))
    beta = stats.binom.sf(v - 1, r, q)
    alpha, total = 0.0, 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        if total > i * alpha:
            alpha = total / i
    return min(float(beta + alpha * delta * 2 * m), 1.0)


def test_the_p_value_is_that_of_the_papers_code() -> None:
    for m, r, v in ((1, 1, 1), (10, 10, 10), (100, 40, 31), (1000, 500, 260), (50, 50, 0), (50, 0, 0)):
        for epsilon in (0.0, 0.3, 1.0, 4.0):
            for delta in (0.0, 1e-6, 1e-3):
                expected = p_value_of_the_paper(m, r, v, epsilon, delta)
                assert p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("guesses", [5, 30, 1000])
def test_if_all_guesses_are_right_there_is_a_closed_form(guesses: int) -> None:
    """(e^ε / (1 + e^ε))^r = 5 %."""
    one = 0.05 ** (1 / guesses)
    assert lower_bound(guesses, guesses, guesses, 0.0, 0.05) == pytest.approx(math.log(one / (1 - one)), abs=1e-3)


def test_guessing_shows_nothing_and_more_shows_more() -> None:
    assert lower_bound(1000, 1000, 500, 0.0, 0.05) == 0 == lower_bound(4, 4, 4, 0.0, 0.05)
    bounds = [lower_bound(1000, 200, v, 1e-5, 0.05) for v in range(120, 201, 10)]
    assert bounds == sorted(bounds) and bounds[0] > 0
    assert lower_bound(1000, 200, 190, 1e-3, 0.05) < lower_bound(1000, 200, 190, 0.0, 0.05)


def test_no_private_mechanism_is_refuted_more_often_than_promised() -> None:
    """Randomized response is ε-private, and guessing what it says is right as often as the theorem allows: its bound is
    met. With a probability of δ for each coin to be told outright, it is (ε, δ)-private."""
    rng, m, epsilon, trials = np.random.default_rng(0), 200, 1.0, 4000
    q = 1 / (1 + math.exp(-epsilon))
    for delta in (0.0, 1e-3):
        right = rng.binomial(m, delta + (1 - delta) * q, trials)
        least = next(v for v in range(m + 1) if p_value(m, m, v, epsilon, delta) < 0.05)
        refuted = (right >= least).mean()
        assert refuted < 0.05 + 3 * math.sqrt(0.05 / trials)
        assert delta or refuted > 0.02, "the bound is tight but for the discreteness"
    for v in range(120, 201, 5):  # the same, exactly
        assert stats.binom.sf(v - 1, m, 1e-3 + (1 - 1e-3) * q) <= p_value(m, m, v, epsilon, 1e-3)


def on_two_ranks(world: World, uri: str) -> Any:
    privacy = PrivacyConfig(epsilon=2.0, delta=1e-3, expected_batch=40, chunk=8)
    audit.secret_key = lambda store: private.KEY
    audit.audit(
        AuditConfig(canaries=101, examples=30),
        privacy,
        private.settings(3),
        1,
        world,
        Store(uri),
        regression.Recorder("a"),
    )
    return [np.load(path) for path in sorted(Path(uri, "releases").iterdir())] if world.rank == 0 else None


def test_what_is_looked_at_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    one, two = (run_ranks(on_two_ranks, n, str(tmp_path / str(n)))[0] for n in (1, 2))
    assert len(one) == 3 and one[0].shape == (101,)
    np.testing.assert_allclose(np.stack(one), np.stack(two), rtol=1e-5, atol=1e-5)


def test_the_job(tmp_path: Path) -> None:
    """Through the runtime, in small."""
    small = [
        "audit.canaries=200",
        "audit.examples=50",
        "privacy.expected_batch=50",
        "privacy.delta=1e-4",
        "train.steps=3",
    ]
    command = [sys.executable, "jobs/audit_privacy.py", "configs/audit_privacy.yaml", *small, f"run.dir={tmp_path}/run"]
    done = run(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "ε is at least" in done.stderr and "audit.png shows it" in done.stderr
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert found["epsilon_lower"] <= found["epsilon_claimed"] <= 4 and found["canaries"] == 200
    assert (tmp_path / "run" / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "run" / "releases").iterdir())) == 3


def test_no_canary_is_shorter_than_what_is_accounted_for() -> None:
    assert AuditConfig().problems() == []
    assert len(AuditConfig(canaries=0, canary_norm=0.5, confidence=1.0).problems()) == 3
