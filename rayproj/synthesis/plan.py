"""What is to be generated, as a pure function of the config and the model: sample i has its label, properties, prompt,
guidance, seed and shard by its id.

The plan is the header of the dataset to be written, so it is stored once, before the first sample; another plan for
the same place is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.encodings import ENCODINGS
from rayproj.data.prompts import read_prompts
from rayproj.diffusion.conditions import LABEL, TEXT, Conditions
from rayproj.diffusion.denoiser import Network
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import DiffusionConfig
from rayproj.engine.checkpoint import Commit, commits
from rayproj.errors import UserError
from rayproj.evaluation.watermark import WatermarkConfig
from rayproj.privacy.certificate import certificate
from rayproj.responsibility.policy import Decision, PolicyConfig, PromptPolicy, allowed
from rayproj.responsibility.provenance import ProvenanceConfig
from rayproj.responsibility.safety import TRIES, SafetyConfig
from rayproj.storage.store import Store, from_json, to_json
from rayproj.synthesis import gate

PROMPT = "prompt"


@dataclass
class ShareConfig:
    """A part of what is drawn. The parts together are any joint distribution, such as P(label) U(group | label)."""

    of: dict[str, str] = field(default_factory=dict)  # label, property or prompt -> its value; of others all, alike
    share: float = 1.0  # against that of the other parts
    guidance: float | None = None  # in place of sampler.guidance; where parts overlap, the last one's

    def problems(self) -> list[str]:
        return [] if self.share > 0 else [f"generate.shares: a share is positive, not {self.share:g}."]


@dataclass
class GenerateConfig:
    """A synthetic dataset from one trained model, by default balanced over classes, properties and prompts."""

    model: str = "???"  # run dir of jobs/train_diffusion.py or jobs/finetune_private.py
    out: str = "???"  # the dataset to write
    ema: float = 0.0  # width of the average of the weights, put together from the commits (`engine.ema`); 0: plain
    weak: str = ""  # run dir of a smaller or less trained model, away from which sampler.guidance leads (autoguidance)
    samples: int = 10000
    size: list[int] = field(default_factory=list)  # height and width in pixels; []: as the model's `diffusion.latents`
    properties: dict[str, list[str]] = field(default_factory=dict)  # property of the model -> the values to draw
    # Texts to draw, if the model knows text; "a {red|dark blue} {cat|dog}" stands for four.
    prompts: list[str] = field(default_factory=list)
    prompts_file: str = ""  # a file with more of them: one a line, or a .csv file with a column "prompt"
    shares: list[ShareConfig] = field(default_factory=list)  # what is drawn how often; []: everything alike
    shard_size: int = 128
    encoding: str = "png"  # of the images: png or webp, without loss, or jpg
    batch: int = 128  # images drawn at once by a sampler
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)  # an invisible watermark
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # what prompts may ask for
    safety: SafetyConfig = field(default_factory=SafetyConfig)  # what images have to pass before they are written
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)  # who signs for the dataset

    def problems(self) -> list[str]:
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            return ["generate.size is [height, width], both positive."]
        if not ENCODINGS.get(self.encoding, ENCODINGS["npy"]).image:
            return ["generate.encoding is png, webp or jpg."]
        found = [f"generate.{k} must be positive." for k in ("samples", "shard_size", "batch") if getattr(self, k) <= 0]
        found += configuration.below(0, "generate", self, "ema")
        if self.weak and (self.sampler.weights or self.sampler.guidance == 1):
            found.append("generate.weak guides by sampler.guidance, other than 1 and without sampler.weights.")
        if self.sampler.weights and any(part.guidance is not None for part in self.shares):
            found.append("generate.shares with guidance do not go with sampler.weights.")
        return found


def shards_in_a_row(config: GenerateConfig) -> int:
    """As many shards as end where a batch does."""
    return math.lcm(config.shard_size, config.batch) // config.shard_size


class Cells:
    """Which value of each axis a sample has. The combinations take turns, the first axis fastest, so that every run of
    samples is as near to the shares as its length allows; over all samples they are exact, to whole samples.

    Args:
        axes: name -> values.
        shares: of `GenerateConfig`, as dicts.
        samples: of the dataset.
    """

    def __init__(self, axes: dict[str, list[str]], shares: list[dict[str, Any]], samples: int) -> None:
        self.axes, self.count = axes, math.prod(map(len, axes.values()))
        self.guidance: np.ndarray = np.full(self.count, np.nan)  # of each combination; nan: the sampler's
        self._order: np.ndarray | None = None
        if not shares:
            return
        weights = np.zeros(self.count)
        for part in shares:
            inside = self._where(part["of"])
            weights += inside * (part["share"] / inside.sum())
            if part["guidance"] is not None:
                self.guidance[inside] = part["guidance"]
        self._order = in_turn(weights, samples)

    def _where(self, of: dict[str, str]) -> np.ndarray:
        """bool [count]: the combinations with these values."""
        inside, step = np.ones(self.count, bool), 1
        for name, values in self.axes.items():
            if name in of:
                inside &= np.arange(self.count) // step % len(values) == values.index(of[name])
            step *= len(values)
        return inside

    def number(self, sample: int) -> int:
        """Of the sample's combination."""
        return sample % self.count if self._order is None else int(self._order[sample])

    def of(self, sample: int) -> dict[str, int]:
        """Axis -> number of the value."""
        rest, found = self.number(sample), {}
        for name, values in self.axes.items():
            rest, found[name] = divmod(rest, len(values))
        return found


def in_turn(weights: np.ndarray, samples: int) -> np.ndarray:
    """int32 [samples]: numbers of the weights, as often as these say, each spread evenly.

    Whole samples by the largest remainders (Hamilton's apportionment); the k-th of n is at (k + ½) / n of the way.
    """
    ideal = samples * weights / weights.sum()
    counts = np.floor(ideal + 1e-9).astype(np.int64)
    counts[np.argsort(counts - ideal, kind="stable")[: samples - counts.sum()]] += 1
    number = np.repeat(np.arange(len(weights), dtype=np.int32), counts)
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
    return number[np.argsort(place, kind="stable")]


def written_out(prompt: str) -> list[str]:
    """All texts that a prompt with alternatives in braces stands for.

    Raises:
        UserError: a brace without its other.
    """
    inner = re.search(r"\{([^{}]*)\}", prompt)
    if not inner:
        if "{" in prompt or "}" in prompt:
            raise UserError(f"generate.prompts: '{prompt}' has a brace without its other.")
        return [" ".join(prompt.split())]
    around = prompt[: inner.start()], prompt[inner.end() :]
    found = [text for word in inner[1].split("|") for text in written_out(word.join(around))]
    return list(dict.fromkeys(found))


def prompts_of(config: GenerateConfig) -> list[str]:
    """Every prompt once, in their order.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    lines = list(config.prompts)
    if config.prompts_file:
        lines += [prompt.text for prompt in read_prompts(config.prompts_file, "generate.prompts_file")]
    return list(dict.fromkeys(text for line in lines for text in written_out(line)))


def decisions_of(config: GenerateConfig) -> list[Decision]:
    """What the policy says of every prompt, in their order.

    Raises:
        UserError: the prompts' file or the policy's cannot be read.
    """
    prompts = prompts_of(config)
    policy = PromptPolicy(config.policy) if prompts else None
    return [policy.decide(prompt) for prompt in prompts] if policy else []


def axes_of(
    config: GenerateConfig, conditions: Conditions, latents: Header, decisions: list[Decision]
) -> dict[str, list[str]]:
    """What is drawn: all classes, and the properties and prompts of the config.

    Raises:
        UserError: the model was not trained for them, or the policy blocks them.
    """
    axes = {LABEL: list(latents.classes)} if LABEL in conditions.values else {}
    for name, values in config.properties.items():
        known = latents.values_of(name) if name in conditions.values else ()
        wrong = [value for value in values if value not in known]
        if not known or wrong or not values or name == LABEL:
            there = {n: list(latents.values_of(n)) for n in conditions.values if n != LABEL}
            raise UserError(f"generate.properties.{name}={values} is nothing this model knows; it knows {there}.")
        axes[name] = values
    prompts = list(dict.fromkeys(d.prompt for d in allowed(config.policy, decisions, "generate.policy")))
    if prompts and not conditions.text:
        raise UserError("generate.prompts: this model was trained without text; its conditions are "
                        f"{', '.join(conditions.values) or 'none'}.")  # fmt: skip
    if prompts:
        axes[PROMPT] = prompts
    for part in config.shares:
        for name, wanted in part.of.items():
            if wanted not in axes.get(name, []):
                choices = ", ".join(axes.get(name, axes)) or "nothing"
                raise UserError(f"generate.shares: {name}={wanted} is nothing that is drawn; there is {choices}.")
    return axes


def plan(config: GenerateConfig, seed: int) -> Header:
    """The header of the dataset to be written.

    Raises:
        UserError: the model's run is not there or has no commit, or the policy blocks what is asked for.
    """
    run = Store(config.model)
    if not run.exists("config.yaml"):
        raise UserError(f"There is no run at '{config.model}'; give the run dir of a trained diffusion model.")
    diffusion = configuration.section(DiffusionConfig, run.read("config.yaml"), "diffusion")
    latents = Dataset.open(diffusion.latents).header
    conditions = Conditions.of(diffusion.conditioned, latents)
    if conditions.low:
        raise UserError(f"'{config.model}' makes images larger, and draws none by itself; give it to jobs/upscale.py.")
    decisions = decisions_of(config)
    axes = axes_of(config, conditions, latents, decisions)
    unknown = sorted(set(config.sampler.weights) - {*conditions.values, *([TEXT] if conditions.text else [])})
    if unknown:
        raise UserError(f"sampler.weights.{unknown[0]}: the model has no such condition.")
    autoencoder = Store(latents.provenance["autoencoder"])
    newest = _newest(run)
    private, weak = certificate(run), _weak(config, diffusion.latents)
    provenance: dict[str, Any] = {
        "model": run.uri,
        "model_commit": commit_hash(newest),
        "model_step": newest.step,
        "autoencoder_commit": commit_hash(_newest(autoencoder)),
        "sampler": configuration.to_dict(config.sampler),
        "seed": seed,
        "ema": config.ema,
        "axes": list(axes.items()),  # a list, because JSON's objects are stored in the order of their names
        **({"shares": [asdict(part) for part in config.shares]} if config.shares else {}),
        # Read after the commit, so that the ledger has every release that is in it.
        "private": private and {**private, "model_commit": commit_hash(newest)},
    }
    provenance |= gate.described(config.watermark, config.safety)
    if decisions and config.policy.use:
        provenance["policy"] = PromptPolicy(config.policy).described(decisions)
    if weak:
        provenance |= {name: weak[name] for name in ("weak", "weak_commit")}
        provenance["private"] = provenance["private"] or weak["private"]
        if private and weak["private"]:
            provenance["private_weak"] = weak["private"]
    shape = _image_shape(config, diffusion, latents, from_json(autoencoder.read("result.json")))
    fields = {"image": Field(config.encoding, shape), "seed": Field("int")}
    fields |= {name: Field("str") for name in ("guidance", "plan", "model_commit", "certificate")}
    if config.safety.rules:
        fields[TRIES] = Field("int")
    for name in axes:
        fields[name] = Field("str") if name == PROMPT else latents.fields[name]
    layout = {
        "samples": config.samples,
        **({"size": config.size} if config.size else {}),
        "shard_size": config.shard_size,
        "classes": list(latents.classes),
    }
    described = to_json({**provenance, **layout})
    provenance["plan"] = hashlib.sha256(described).hexdigest()
    return Header(
        name=f"synthetic {latents.name.removesuffix(' latents')}",
        fields=fields,
        num_samples=config.samples,
        shard_size=config.shard_size,
        classes=latents.classes,
        licence=latents.licence,
        attribution=latents.attribution,
        provenance=provenance,
    )


def _image_shape(
    config: GenerateConfig, diffusion: DiffusionConfig, latents: Header, autoencoder: dict[str, Any]
) -> tuple[int, ...]:
    """[C, H, W] of what is drawn."""
    channels, *sides = autoencoder["image_shape"]
    factor, own = sides[1] // autoencoder["latent_shape"][2], latents.fields["moments"].shape[1:]
    if config.size:
        denoiser = diffusion.denoiser
        several = denoiser.network is Network.unet and not denoiser.weights
        unit = factor * 2 ** (len(denoiser.channels) - 1)
        if not several or any(side % unit for side in config.size):
            takes = f"sides that are multiples of {unit}" if several else f"{own[0] * factor}x{own[1] * factor} alone"
            raise UserError(f"generate.size={config.size}: the model of '{config.model}' draws {takes}.")
    return channels, *(config.size or (side * factor for side in own))


def _weak(config: GenerateConfig, latents: str) -> dict[str, Any]:
    """The model that guides, for the provenance, and its certificate.

    Raises:
        UserError: it has no run, or would tell of private images what the model that it guides must not.
    """
    if not config.weak:
        return {}
    run = Store(config.weak)
    if not run.exists("config.yaml"):
        raise UserError(
            f"There is no run at '{config.weak}'; give generate.weak the run dir of a trained diffusion model."
        )
    private = certificate(run)
    learned = configuration.section(DiffusionConfig, run.read("config.yaml"), "diffusion").latents
    if certificate(Store(config.model)) and not private and Store(learned).uri == Store(latents).uri:
        raise UserError(
            f"generate.weak='{config.weak}' learned from the private images of generate.model without privacy, so that what "
            "both draw would have no guarantee; give a private one, or one of other images."
        )
    return {"weak": run.uri, "weak_commit": commit_hash(_newest(run)), "private": private}


def stated(certificate: dict[str, Any] | None) -> str:
    """What a sample says of the privacy of its model; "" for a model that saw no private data."""
    if not certificate:
        return ""
    return f"epsilon={certificate['epsilon']:.6g} delta={certificate['delta']:g} ledger={certificate['ledger'][:16]}"


def commit_hash(commit: Commit) -> str:
    """Identifies a checkpoint by the contents of its files."""
    return hashlib.sha256(to_json([asdict(f) for f in commit.files])).hexdigest()


def _newest(run: Store) -> Commit:
    done = commits(run)
    if not done:
        raise UserError(f"The run {run.uri} has no committed checkpoint; train it first.")
    return done[-1]
