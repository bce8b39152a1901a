"""The model card of an export: a README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from rayproj import __version__
from rayproj import config as configuration
from rayproj.data.dataset import Header
from rayproj.engine.checkpoint import Commit
from rayproj.errors import UserError
from rayproj.storage.store import Store, from_json
from rayproj.synthesis.plan import commit_hash


@dataclass
class Card:
    """What a card says beside what the run itself says.

    Attributes:
        about: what the model is.
        library: of the front matter: which library loads it.
        tags: of the front matter.
        code: a Python script that loads the export and uses it, run from its folder.
        commit: the checkpoint whose averaged weights were exported.
        data: sentences on what it learned from.
        privacy: sentences on what is guaranteed of that.
    """

    about: str
    library: str
    tags: list[str]
    code: str
    commit: Commit
    data: list[str]
    privacy: list[str]


def render(card: Card, run: Store) -> str:
    """The text of the card."""
    values = OmegaConf.to_container(OmegaConf.create(run.read("config.yaml").decode()))
    assert isinstance(values, dict)
    result = from_json(run.read("result.json")) if run.exists("result.json") else {}
    facts = {
        "run": f"`{last_part(run.uri)}`",
        "job": f"`{result['job']}`" if result else "not finished",
        "step": f"{card.commit.step} of {values['train']['steps']}",
        "weights": "exponential moving average, fp32",
        "commit": f"`{commit_hash(card.commit)}` (SHA-256 over the records of the checkpoint's files)",
        "made by": f"rayproj {__version__}",
    }
    measured = {"parameters": "{:,}", "samples_seen": "{:,}", "psnr": "{:.2f} dB"}
    facts |= {name.replace("_", " "): form.format(result[name]) for name, form in measured.items() if name in result}
    shown = {name: value for name, value in values.items() if name not in ("run", "cluster", "tracking")}
    return "\n".join(
        [
            "---",
            f"library_name: {card.library}",
            "tags:",
            *(f"- {tag}" for tag in card.tags),
            "# license: state it before you publish; the licence of the data is below",
            "---",
            f"\n# {last_part(run.uri)}\n",
            card.about,
            "\n## Use\n",
            "In this folder:\n",
            f"```python\n{card.code.strip()}\n```",
            "\n## What it is\n",
            "| | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "\n## Data\n",
            *(f"- {line}" for line in card.data),
            "\n## Differential privacy\n",
            *(f"- {line}" for line in card.privacy),
            "\n## Config\n",
            "Of a path, the last part.\n",
            f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(without_paths(shown))).strip()}\n```\n",
        ]
    )


def last_part(path: str) -> str:
    """Of a path or URI. A card is for others, whom the places on this machine do not concern."""
    return path.rstrip("/").rpartition("/")[2]


def without_paths(value: Any) -> Any:
    """A config with the last part of each path alone."""
    if isinstance(value, dict):
        return {name: without_paths(child) for name, child in value.items()}
    return last_part(value) if isinstance(value, str) else value


def describe(header: Header, what: str) -> str:
    """A sentence on a dataset: what it served for, its size, its licence, whom to name."""
    terms = [f"licence {header.licence}"] if header.licence else []
    terms += [header.attribution] if header.attribution else []
    return f"{what}: {header.name}, {header.num_samples:,} samples" + "".join(f"; {term}" for term in terms) + "."


def guarantee(privacy: dict[str, Any], data: str) -> str:
    """A sentence on a private training, from the record that it left."""
    epsilon = math.ceil(1000 * privacy["epsilon"]) / 1000  # never rounded down
    said = (
        f"ε = {epsilon:g} at δ = {privacy['delta']:g} for each of the {privacy['num_samples']:,} examples of "
        f"{data} (relation {privacy['relation']}; DP-SGD with noise multiplier {privacy['noise_multiplier']:.4g}, sampling "
        f"rate {privacy['sample_rate']:.4g}, clip norm {privacy['clip_norm']:g}, {privacy['releases']} updates; "
        f"{privacy['accountant']})."
    )
    if privacy["unsafe_metrics"]:
        said += (
            " The training also reported losses and previews, which this does not cover; they are not in this folder."
        )
    return said


def no_guarantee(data: str) -> str:
    return f"None for {data}: the model may have learned single examples of it by heart."


def guarantees(run: Store, data: str) -> list[str]:
    """One sentence on a diffusion run and one on each that it started from.

    Raises:
        UserError: the run is private and not finished, so its ε is not stated yet.
    """
    text = run.read("config.yaml")
    found = [no_guarantee(data)]
    if "privacy" in OmegaConf.create(text.decode()):
        if not run.exists("result.json"):
            raise UserError(f"The private run '{run.uri}' is not finished, so its ε is not known; finish it first.")
        found = [guarantee(from_json(run.read("result.json"))["privacy"], data)]
    init = configuration.value(text, "diffusion")["init"]
    if init:
        before = f"the data of the run `{last_part(init)}` that it started from"
        found += guarantees(Store(init), before) if Store(init).exists("config.yaml") else [no_guarantee(before)]
    return found
