"""The ledger and the secret."""

import stat

import numpy as np
import pytest

from rayproj.privacy import accounting
from rayproj.privacy.ledger import Ledger, epsilon_spent, next_start, secret_key, spent
from rayproj.privacy.plan import PrivacyConfig, plan
from rayproj.storage.store import Store


def test_the_secret_is_made_once_and_readable_by_its_owner_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path))
    key = secret_key(store)
    assert len(key) == 16 and secret_key(store) == key
    assert secret_key(Store(str(tmp_path / "other"))) != key
    assert stat.S_IMODE((tmp_path / "secret" / "key").stat().st_mode) == 0o600


def test_records_never_hold_the_secret_and_a_release_is_charged_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path))
    key = secret_key(store)
    mechanism = plan(PrivacyConfig(noise_multiplier=1.0, expected_batch=10), 1000, 5)
    ledger = Ledger(store, mechanism, key, next_start(store))
    ledger.charge(0)
    ledger.charge(1)
    with pytest.raises(RuntimeError, match="charged already"):
        ledger.charge(1)
    assert [(r["step"], r["start"], r["noise_multiplier"]) for r in spent(store)] == [(0, 0, 1.0), (1, 0, 1.0)]
    assert next_start(store) == 1
    for path in store.list("ledger"):
        assert key not in store.read(path) and key.hex().encode() not in store.read(path)


def test_a_draw_released_twice_costs_what_integration_says(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Two starts release one step: the same Poisson draw under two Gaussians. Its δ at the ledger's ε, by the definition:
    the mixture over whether the example was drawn against the noise alone, integrated over the plane, both ways round."""
    q, sigma, delta = 0.3, 1.1, 1e-3
    store, key = Store(str(tmp_path)), bytes(16)
    mechanism = plan(PrivacyConfig(noise_multiplier=sigma, expected_batch=240, delta=delta), 800, 5)
    for start in (0, 1):
        Ledger(store, mechanism, key, start).charge(3)
    epsilon = epsilon_spent(spent(store), delta)

    axis = np.linspace(-9 * sigma, 9 * sigma + 1, 2001)
    cell = (axis[1] - axis[0]) ** 2
    x, y = np.meshgrid(axis, axis)
    without = np.exp(-(x**2 + y**2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    drawn = np.exp(-((x - 1) ** 2 + (y - 1) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    mixture = (1 - q) * without + q * drawn
    deltas = [np.maximum(a - np.exp(epsilon) * b, 0).sum() * cell for a, b in ((mixture, without), (without, mixture))]
    assert max(deltas) == pytest.approx(delta, rel=1e-2)
    assert epsilon > 1.1 * accounting.epsilon(q, sigma, 2, delta), "two independent draws would cost clearly less"


def test_other_steps_and_other_keys_are_other_draws(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path))
    mechanism = plan(PrivacyConfig(noise_multiplier=1.0, expected_batch=10), 1000, 5)
    for step, start, key in ((0, 0, bytes(16)), (1, 0, bytes(16)), (1, 1, bytes(range(16)))):
        Ledger(store, mechanism, key, start).charge(step)
    assert epsilon_spent(spent(store), 1e-5) == mechanism.epsilon(3)
