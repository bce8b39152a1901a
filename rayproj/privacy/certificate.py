"""The certificate of a private model: what its training has spent, by its ledger, and by which mechanism."""

from __future__ import annotations

import hashlib
from typing import Any

from omegaconf import OmegaConf

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.errors import UserError
from rayproj.privacy.ledger import epsilon_spent, spent
from rayproj.privacy.plan import PrivacyConfig, plan
from rayproj.storage.store import Store, from_json, to_json


def ledger_digest(records: list[dict[str, Any]]) -> str:
    """SHA-256 over the ledger's records, in the order of `spent`: whoever has the ledger can make it again."""
    return hashlib.sha256(to_json(records)).hexdigest()


def certificate(run: Store) -> dict[str, Any] | None:
    """What is guaranteed of everything that a model's run gives, as of now; None if it saw no private data.

    Of a finished run, the plan is the one that it recorded; of another, that of its config. ε is always the ledger's. A
    model that was trained from a private one is post-processing of it, so it has that one's certificate, "through" itself;
    one that is private itself names the other under "initialised_from": ε holds for the private data of each by itself.

    Raises:
        UserError: the folder is of no run, or its private data are not there any more before it has finished.
    """
    if not run.exists("config.yaml"):
        raise UserError(f"There is no run at '{run.uri}'; give the run dir of a trained model.")
    text = run.read("config.yaml")
    values: Any = OmegaConf.to_container(OmegaConf.create(text.decode()))
    init = (values.get("diffusion") or {}).get("init")
    before = certificate(Store(init)) if init and Store(init).exists("config.yaml") else None
    if "privacy" not in values:
        return before and {**before, "through": run.uri}
    own = _own(run, values)
    return {**own, "initialised_from": before} if before else own


def _own(run: Store, values: dict[str, Any]) -> dict[str, Any]:
    records = spent(run)
    if run.exists("result.json"):
        described = from_json(run.read("result.json"))["privacy"]
    else:
        config = configuration.from_dict(PrivacyConfig, values["privacy"])
        num_samples = Dataset.open(values["diffusion"]["latents"]).header.num_samples
        described = plan(config, num_samples, values["train"]["steps"]).describe()
        described["unsafe_metrics"] = config.unsafe_metrics
    return {
        **described,
        "epsilon": epsilon_spent(records, described["delta"]),
        "releases": len(records),
        "ledger": ledger_digest(records),
        "run": run.uri,
    }
