"""The ledger and the secret."""

import stat

import pytest

from rayproj.privacy.ledger import Ledger, next_start, secret_key, spent
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
