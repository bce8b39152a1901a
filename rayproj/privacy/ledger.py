"""The spend ledger: what a run has released, written before it is released, and never unwritten.

    ledger/00000041-00000002.json    step 41 by the third start of the run

A record is created, durably, before the step's noise is drawn. A start that dies after it has been charged for a release
that perhaps never was; the next start charges its own. ε composes all records.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from typing import Any

from rayproj import faults
from rayproj.errors import UserError
from rayproj.privacy import accounting
from rayproj.privacy.plan import PrivacyPlan
from rayproj.storage.store import Store, from_json, to_json

CLOSED = "closed.json"  # of a run that may release nothing more


def secret_key(store: Store) -> bytes:
    """The run's 16 secret bytes, made at first use. They never enter a config, a log or W&B.

    Whoever can read them can undo the protection; on a local store the file is readable by its owner alone.
    """
    folder = store.local_path()
    if folder is not None:  # closed before there is anything in it
        (folder / "secret").mkdir(mode=0o700, parents=True, exist_ok=True)
    store.put_once("secret/key", os.urandom(16))
    if folder is not None:
        (folder / "secret" / "key").chmod(0o600)
    return store.read("secret/key")


class Ledger:
    """Records the releases of one start of a run.

    Args:
        key: the run's secret; the records hold its hash, to tell keys apart.
        start: number of this start; it enters the noise's key, so that a step that is done again has other noise.
    """

    def __init__(self, store: Store, plan: PrivacyPlan, key: bytes, start: int) -> None:
        self.store, self.plan, self.start = store, plan, start
        self.key_id = hashlib.sha256(b"id" + key).hexdigest()[:16]

    def charge(self, step: int) -> None:
        """Record the release of a step; on return it is durable.

        Raises:
            UserError: the run was closed. (Looked at after the record is there: whoever has closed it and reads the ledger
                then sees every release that was let through.)
        """
        faults.maybe("ledger.before_record")
        path = f"ledger/{step:08d}-{self.start:08d}.json"
        if not self.store.put_once(path, to_json(self.record(step))):
            raise RuntimeError(
                f"Step {step} of start {self.start} is charged already: two drivers run {self.store.uri}."
            )
        faults.maybe("ledger.after_record")
        refuse_closed(self.store)

    def record(self, step: int) -> dict[str, Any]:
        """What is recorded of a release."""
        return {
            "step": step,
            "start": self.start,
            "sample_rate": self.plan.sample_rate,
            "noise_multiplier": self.plan.noise_multiplier,
            "overflow": self.plan.overflow,
            "plan": self.plan.digest(),
            "key": self.key_id,
        }


def refuse_closed(store: Store) -> None:
    """Raise UserError for a run that was closed."""
    if store.exists(CLOSED):
        raise UserError(
            f"The private run '{store.uri}' was closed by 'rayproj privacy close', so it may release nothing more; its last "
            "commit can be used as it is, and another run.dir be begun."
        )


def next_start(store: Store) -> int:
    """Number of the next start: one more than any in the ledger."""
    starts = (int(path.removesuffix(".json").rpartition("-")[2]) for path in store.list("ledger"))
    return max(starts, default=-1) + 1


def spent(store: Store) -> list[dict[str, Any]]:
    """Every record, by step and start."""
    return [from_json(store.read(path)) for path in store.list("ledger")]


def mechanisms(records: list[dict[str, Any]]) -> list[tuple[float, float, int]]:
    """What the records compose to: (sample rate, noise multiplier, updates) each.

    The examples of a step are drawn from the key and the step alone. Starts that did a step again therefore released the
    same draw again: one Poisson sample under several Gaussians, which is one with σ = (Σ σᵢ⁻²)^(-1/2), and not several
    samples, whose ε would be less. (That steps interleave does not matter: concurrent composition, Vadhan and Zhang 2023.)
    """
    draws: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        draws.setdefault((record["step"], record["key"]), []).append(record)
    counts: Counter[tuple[float, float]] = Counter()
    for draw in draws.values():
        rate = min(1.0, sum({r["sample_rate"] for r in draw}))
        sigmas = [r["noise_multiplier"] for r in draw]
        sigma = sigmas[0] / math.sqrt(len(sigmas)) if len(set(sigmas)) == 1 else sum(s**-2 for s in sigmas) ** -0.5
        counts[rate, sigma] += 1
    return [(rate, sigma, updates) for (rate, sigma), updates in counts.items()]


def epsilon_spent(records: list[dict[str, Any]], delta: float) -> float:
    """ε at δ of all that was recorded; a step that was charged twice counts twice."""
    draws = {(record["step"], record["key"]): record["overflow"] for record in records}
    return accounting.epsilon_of(mechanisms(records), delta, sum(draws.values()))
