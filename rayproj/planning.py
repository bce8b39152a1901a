"""What a job would need and do, worked out without starting anything: `rayproj plan JOB CONFIG key=value ...`.

A job says two things of itself, where they apply: `task_of(config, header)`, what it trains; and `shards_of(config,
inputs)`, the headers of the datasets that it writes. Everything else is in its config.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

from rayproj import config as configuration
from rayproj.data.dataset import Field, Header, Inputs
from rayproj.data.encodings import ENCODINGS
from rayproj.diffusion.conditions import LABEL, LOW, TEXT, ConditionConfig
from rayproj.diffusion.task import DiffusionTask
from rayproj.engine import memory
from rayproj.engine.checkpoint import CheckpointConfig
from rayproj.engine.engine import Precision
from rayproj.engine.steps import PlainStep, world_sizes
from rayproj.engine.training import TrainConfig
from rayproj.errors import UserError
from rayproj.privacy.clipping import clipped_sum, refuse_cross_example_layers
from rayproj.privacy.plan import ClippingPath, PrivacyConfig, PrivacyPlan
from rayproj.privacy.plan import plan as privacy_plan
from rayproj.privacy.step import refuse_engine
from rayproj.privacy.tape import Uncovered
from rayproj.storage.store import Store, to_json

# A rank on CPU with torch, DeepSpeed, diffusers and Ray imported and its first step done: resident bytes, measured.
BASE = 560 << 20
HELD_BACK = 0.125  # of what is in use: freed, but not given back by malloc; measured 0.02 to 0.25 from case to case
HELD_BACK_PRIVATE = 0.7  # of private training, whose pieces of many sizes leave more gaps; measured 0.4 to 1
READER_CACHE = 1 << 30  # bound of `Reader` on the decoded shards that it keeps


@dataclass(frozen=True)
class Assumed:
    """What is to be taken for a dataset that is not there yet."""

    samples: int = 0
    shape: tuple[int, ...] = ()  # of an image or a latent, [C, H, W]
    classes: int = 0
    text: tuple[int, ...] = (24, 384)  # tokens and dimension of a caption's embedding; those of the default encoder

    def header(self) -> Header | None:
        if not (self.samples and self.shape and self.classes):
            return None
        channels, *sides = self.shape
        fields = {
            "image": Field("png", self.shape),
            "moments": Field("npy", (2 * channels, *sides)),
            "label": Field("int"),
        }
        return Header("assumed", fields, self.samples, 1000, tuple(map(str, range(self.classes))))


@dataclass
class Plan:
    """What is known of a job; None or empty where a job has no such thing, or it cannot be known yet."""

    job: str
    run: str
    bundles: list[dict[str, float]] = field(default_factory=list)  # what is reserved: one for each rank or actor
    together: bool = True  # all bundles or none
    world_sizes: list[int] | None = None  # None: any
    zero_stage: int | None = None  # the config's
    parameters: int | None = None
    steps: int | None = None
    samples: int | None = None  # seen in training; expected ones if private
    epochs: float | None = None
    privacy: dict[str, Any] | None = None  # as `bought` says
    memory: dict[int, dict[str, int]] = field(default_factory=dict)  # bytes of a rank by ZeRO stage, by part
    host: dict[str, int] = field(default_factory=dict)  # bytes of a rank on the host, where the device is a GPU
    base: int = BASE
    commit: int | None = None  # bytes of one checkpoint
    commits: int | None = None  # as many are there at most
    shards: dict[str, dict[str, int | None]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    fits: bool | None = None  # None: not judged
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> dict[int, int]:
        """Bytes of a rank at its fullest, by ZeRO stage, without the base."""
        return {stage: sum(parts.values()) for stage, parts in self.memory.items()}

    @property
    def disk(self) -> int:
        return (self.commit or 0) * (self.commits or 0) + sum(s["bytes"] or 0 for s in self.shards.values())


def plan(module: ModuleType, config: Any, assumed: Assumed = Assumed()) -> Plan:
    """Plan a job under its config.

    Args:
        module: of `jobs/`.

    Raises:
        UserError: the job would refuse the config.
    """
    found = Plan(module.__name__.rpartition(".")[2], config.run.dir)
    inputs = Inputs(assumed.header())
    gpus = 0 if os.environ.get("RAY_ADDRESS") else torch.cuda.device_count()
    if hasattr(config, "cluster"):
        cluster = config.cluster
        found.bundles = [_bundle(cluster.cpus_per_rank, cluster.gpus_per_rank, gpus)] * max(1, cluster.ranks)
    if hasattr(config, "pool"):
        pool = config.pool
        found.bundles = [_bundle(pool.cpus_per_actor, pool.gpus_per_actor, gpus)] * pool.actors
        found.together = False
    if hasattr(module, "task_of"):
        _plan_training(found, module, config, inputs, assumed)
    if hasattr(module, "shards_of"):
        headers = module.shards_of(config, inputs)
        found.shards = {uri: shards(header) for uri, header in headers.items()}
    for uri in dict.fromkeys(inputs.missing):
        taken = "what --samples, --shape and --classes say is taken instead" if inputs.assumed else (
            "give --samples, --shape (CxHxW of an image or latent) and --classes to plan what depends on it"
        )  # fmt: skip
        found.notes.append(f"'{uri}' is not there yet, or not finished; {taken}.")
    judge(found)
    return found


def _bundle(cpus: float, gpus: float | None, there: int) -> dict[str, float]:
    """As `rayproj.runtime.placement.bundle`, of this machine."""
    gpus = float(bool(there)) if gpus is None else gpus
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def _plan_training(found: Plan, module: ModuleType, config: Any, inputs: Inputs, assumed: Assumed) -> None:
    train: TrainConfig = config.train
    privacy: PrivacyConfig | None = getattr(config, "privacy", None)
    ranks = max(1, config.cluster.ranks)
    found.steps, found.zero_stage, found.commits = train.steps, train.engine.zero_stage, kept_commits(train)
    micro_batches = 1
    if privacy is None:
        found.world_sizes = world_sizes(train.batch, train.micro_batch)
        micro_batches = PlainStep(train.batch, train.micro_batch, ranks).micro_batches
    else:
        refuse_engine(train.engine)
    batch = privacy.expected_batch if privacy else train.batch
    found.samples = None if privacy and not train.steps else train.steps * batch
    if hasattr(config, "diffusion"):
        header = inputs.header(config.diffusion.latents)
        if header.fields and config.diffusion.latents in inputs.missing:
            header = _conditioned(header, config.diffusion.conditioned, assumed)
    else:
        header = inputs.header(config.data).only("image", "label")
    if not header.fields:
        return
    if privacy:
        mechanism = privacy_plan(privacy, header.num_samples, train.steps)
        found.steps, batch = mechanism.steps, int(mechanism.normaliser)
        found.samples = found.steps * batch
        found.privacy = bought(mechanism)
    assert found.samples is not None
    found.epochs = found.samples / header.num_samples
    on_gpu = "GPU" in (found.bundles[0] if found.bundles else {})
    precision = train.engine.precision
    bf16 = precision is Precision.bf16 or (precision is Precision.auto and on_gpu)
    task = module.task_of(config, header)
    header = header.only(*task.fields) if isinstance(task, DiffusionTask) else header
    model = memory.Model(task, bf16)
    if privacy:
        refuse_cross_example_layers(model.module)
    found.parameters, found.commit = model.parameters, memory.checkpoint_bytes(model, 1 + len(train.engine.ema_widths))
    held = {"decoded data": min(READER_CACHE, _decoded(header))}
    passing = example_memory(model, header, batch // ranks // micro_batches, privacy)
    for stage in (0, 1, 2, 3):
        layout = memory.Layout(stage, ranks, bf16, on_gpu, micro_batches, 1 + len(train.engine.ema_widths))
        parts, host = rank_memory(model, layout, passing, train, privacy)
        found.memory[stage] = parts if on_gpu else parts | host | held
        if on_gpu and stage == found.zero_stage:
            found.host = host | held


def _conditioned(header: Header, conditions: dict[str, ConditionConfig], assumed: Assumed) -> Header:
    """Assumed latents with all that a model is conditioned on; properties with two values."""
    fields = dict(header.fields)
    for name, config in conditions.items():
        fields |= {f"{TEXT}_{caption}": Field("npy", assumed.text) for caption in config.captions}
        if name == LOW:
            fields[name] = Field("png", (3, *header.fields["moments"].shape[1:]))
        elif name not in (TEXT, LABEL):
            fields[name] = Field("int", values=("0", "1"))
    return replace(header, fields=fields)


def bought(mechanism: PrivacyPlan) -> dict[str, Any]:
    """What a private plan costs, on the way and beside other settings of each of its knobs."""
    per_epoch = 1 / mechanism.sample_rate
    epochs = mechanism.steps / per_epoch
    # Every epoch of a few, else ten of them.
    marks = {max(1, round(epochs * k / min(10, max(1, round(epochs))))) for k in range(1, 11)}
    others: dict[str, dict[str, Any]] = {
        "half the steps": {"steps": max(1, mechanism.steps // 2)},
        "twice the steps": {"steps": 2 * mechanism.steps},
        "half the expected batch": {"sample_rate": mechanism.sample_rate / 2},
        "twice the expected batch": {"sample_rate": min(1.0, 2 * mechanism.sample_rate)},
        "1.5 times the noise": {"noise_multiplier": 1.5 * mechanism.noise_multiplier},
        "a tenth of δ": {"delta": mechanism.delta / 10},
    }
    return {
        "epsilon": mechanism.epsilon(),
        "delta": mechanism.delta,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "by_epoch": {n: mechanism.epsilon(round(n * per_epoch)) for n in sorted(marks) if n <= epochs},
        "instead": {what: replace(mechanism, **change).epsilon() for what, change in others.items()},
    }


def example_memory(model: memory.Model, header: Header, examples: int, privacy: PrivacyConfig | None) -> dict[str, int]:
    """What comes and goes with the examples of one forward and backward of a rank."""
    dtypes = {"int": torch.int64, "float": torch.float64}
    dtypes |= {name: torch.uint8 if encoding.image else torch.float32 for name, encoding in ENCODINGS.items()}
    fields = {n: (f.shape, dtypes[f.encoding]) for n, f in header.fields.items() if f.encoding in dtypes}
    if privacy is None:
        return {"activations": model.forward_and_backward(model.batch(examples, fields))}
    # Two chunks show what one leaves alive while the next begins.
    batch = model.batch(max(1, min(examples, 2 * privacy.chunk)), fields)

    # Of the paths that `auto` chooses from, each is tried at the start.
    paths = [privacy.path]
    if privacy.path is ClippingPath.auto and not model.bf16:
        paths.append(ClippingPath.two_pass)

    def work() -> None:
        for path in paths:
            with suppress(Uncovered) if path is not privacy.path else nullcontext():
                clipped_sum(
                    model.module,
                    model.task.losses,
                    model.trained,
                    batch,
                    privacy.multiplicity,
                    privacy.clip_norm,
                    privacy.chunk,
                    path,
                )

    return {"per-example gradients": model.peak(work)}


def rank_memory(
    model: memory.Model,
    layout: memory.Layout,
    passing: dict[str, int],
    train: TrainConfig,
    privacy: PrivacyConfig | None = None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a rank at its fullest, by part: on its device, and for checkpoints on its host.

    The parts add up although they are not all needed at the same moment: what one phase frees, neither malloc nor torch's
    caching allocator gives back before the next. On a host there is more that malloc holds back between what is in use.
    """
    share, whole = layout.share(model), 4 * model.parameters
    if privacy is None:
        work = memory.update(model, layout)
    else:
        # The sum over the ranks, for which gloo has a buffer, and this rank's share of it; then that share without noise and
        # with it, and AdamW's two vectors. At ZeRO-3 the sum, and the weights, whole for the length of the forwards and
        # backwards; noise is drawn parameter by parameter.
        gathered, gloo = layout.weight * model.parameters, 0 if layout.on_gpu or layout.world_size == 1 else whole
        work = whole + gathered if layout.zero_stage == 3 else gloo + max(whole + share, 4 * share)
    if train.preview_every:
        work = max(work, 3 * whole)  # the averaged weights, as shares and joined, and a model of them
    host = memory.snapshot(model, layout)
    parts = memory.kept(model, layout) | passing
    if privacy is not None and not layout.on_gpu:
        parts.pop("gradients", None)  # DeepSpeed's buffers, which nothing is ever written to
    if layout.on_gpu:
        return parts | {"update": work}, {"checkpoint's copy": host}
    if train.checkpoint.asynchronous:
        parts |= {"update": work, "checkpoint's copy": host}
    else:
        parts |= {"update or checkpoint": max(work, host)}
    held_back = HELD_BACK if privacy is None else HELD_BACK_PRIVATE
    return parts | {"held back by malloc": int(held_back * sum(parts.values()))}, {}


def kept_commits(train: TrainConfig) -> int:
    """How many checkpoints there are at most, with the one that is being written."""
    config: CheckpointConfig = train.checkpoint
    for_ever = train.steps // config.keep_every if config.keep_every else 0
    return config.keep_last + for_ever + config.keep_best + 1


def _decoded(header: Header) -> int:
    """Bytes of a dataset's arrays in memory."""
    return header.num_samples * sum(_width(f) * prod(f.shape) for f in header.fields.values())


def _width(field: Field) -> int:
    """Bytes of a number."""
    return np.dtype(field.array.dtype).itemsize if field.array else 8


def shards(header: Header) -> dict[str, int | None]:
    """Samples and shards of a dataset, and its bytes in tars; images count as if PNG could not make them smaller."""
    known: dict[str, int | None] = {"samples": header.num_samples or None, "shards": header.num_shards or None}
    if not header.fields or not header.num_samples:
        return {**known, "bytes": None}
    arrays = [(64 if f.array.image else 128) + prod(f.shape) * _width(f) for f in header.fields.values() if f.array]
    json = 32 * len(header.fields)  # all scalars of a sample are one member
    sample = sum(512 + -(-size // 512) * 512 for size in [*arrays, json])
    return {**known, "bytes": header.num_samples * sample + header.num_shards * 10240}


def judge(found: Plan) -> None:
    """Whether this machine has the memory and the disk."""
    if os.environ.get("RAY_ADDRESS"):
        found.notes.append("RAY_ADDRESS is set: whether the plan fits that cluster is not judged.")
        return
    good = []
    if found.zero_stage is not None and found.memory:
        good.append(_judge_memory(found, found.zero_stage))
    folder = Store(found.run).local_path() if "://" not in found.run else None
    if folder is not None and found.disk:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        good.append(found.disk <= free)
        remedy = "" if good[-1] else "; lower train.checkpoint.keep_last or keep_best, or set run.dir to another disk"
        found.verdicts.append(_verdict(good[-1], f"disk: {_size(found.disk)} of {_size(free)} free{remedy}"))
    found.fits = all(good) if good else None


def _judge_memory(found: Plan, stage: int) -> bool:
    ranks, need = len(found.bundles), found.peak[stage]
    if "GPU" in found.bundles[0]:
        device = "GPU memory"
        have = min(
            (torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())), default=0
        )
        fine, needed = need <= 0.95 * have, f"{_size(need)} a rank"
        if ranks > torch.cuda.device_count():
            found.notes.append(f"This machine has {torch.cuda.device_count()} GPUs, and {ranks} ranks want one each.")
    else:
        device, have = "memory", psutil.virtual_memory().available
        fine = ranks * (need + found.base) <= have
        needed = f"{_size(ranks * (need + found.base))} for {ranks} ranks with their processes"
    remedy = "; lower train.micro_batch, or set a larger train.engine.zero_stage, or cluster.ranks on more machines"
    if found.privacy:
        remedy = "; lower privacy.chunk or privacy.multiplicity, or use more machines with fewer ranks each"
    found.verdicts.append(_verdict(fine, f"{device}: {needed}, of {_size(have)}{'' if fine else remedy}"))
    return fine


def _verdict(fine: bool, text: str) -> str:
    return f"{'fits' if fine else 'does not fit'}: {text}"


def _size(size: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size >= 100 or units[0] == "B" else f"{size:.1f} {units[0]}"


def show(found: Plan) -> str:
    """The plan as text."""
    lines = [("job", f"{found.job}, in {found.run}")]
    if found.bundles:
        one = " and ".join(f"{amount:g} {kind}" for kind, amount in found.bundles[0].items())
        what = "ranks, placed together or not at all" if found.together else "actors, as there is room"
        lines.append(("placement", f"{len(found.bundles)} x {{{one}}}: {what}"))
    else:
        lines.append(("placement", "none: the driver does all the work"))
    if found.steps is not None:
        sizes = found.world_sizes
        some = "any number" if sizes is None else ", ".join(map(str, sizes[:12])) + (" ..." if sizes[12:] else "")
        lines.append(("ranks allowed", some))
        known = f", {found.epochs:.4g} epochs" if found.epochs else ""
        expected = "about " if found.privacy else ""
        samples = f", {expected}{found.samples:,} samples" if found.samples else ""
        lines.append(
            ("training", f"{f'{found.steps:,}' if found.steps else 'as many as ε allows'} steps{samples}{known}")
        )
    if found.parameters is not None:
        lines.append(("parameters", f"{found.parameters:,}"))
    if found.privacy:
        p = found.privacy
        text = f"ε = {p['epsilon']:.4g} at δ = {p['delta']:g} after the last step, if no step is done twice"
        noise = f"noise multiplier {p['noise_multiplier']:.4g}, sample rate {p['sample_rate']:.4g}"
        lines.append(("privacy", f"{text}; {noise}"))
        if p["by_epoch"]:
            lines.append(("ε after epoch", ", ".join(f"{n}: {value:.3g}" for n, value in p["by_epoch"].items())))
        lines.append(("ε would be", ", ".join(f"{value:.3g} with {what}" for what, value in p["instead"].items())))
    if found.commit is not None:
        total = _size(found.commit * (found.commits or 0))
        lines.append(("checkpoints", f"{_size(found.commit)} each, at most {found.commits} at a time: {total}"))
    for uri, dataset in found.shards.items():
        if dataset["samples"]:
            most = f"at most {_size(dataset['bytes'])}" if dataset["bytes"] else "of unknown size"
            lines.append(("shards", f"{uri}: {dataset['samples']:,} samples in {dataset['shards']:,} shards, {most}"))
        else:
            lines.append(("shards", f"{uri}: as many as its input has"))
    shown = [f"{name:<15}{value}" for name, value in lines]
    if found.memory:
        shown += ["", *_table(found)]
    if found.host:
        shown.append(f"{'on the host':<15}" + ", ".join(f"{name} {_size(v)}" for name, v in found.host.items()))
    ends = [*found.verdicts, *(f"note: {note}" for note in found.notes)]
    return "\n".join([*shown, *([""] if ends else []), *ends])


def _table(found: Plan) -> list[str]:
    """Memory of a rank: a row for each part, a column for each stage; * marks the config's."""
    parts = dict.fromkeys(name for stage in found.memory.values() for name in stage)
    width = max(map(len, [*parts, "with the process's own"])) + 2
    heads = [f"ZeRO-{stage}{'*' if stage == found.zero_stage else ''}" for stage in found.memory]
    rows = [("memory of a rank", heads)]
    rows += [(name, [_size(s[name]) if name in s else "" for s in found.memory.values()]) for name in parts]
    rows.append(("together", [_size(size) for size in found.peak.values()]))
    if "GPU" not in found.bundles[0]:
        rows.append(("with the process's own", [_size(size + found.base) for size in found.peak.values()]))
    return [f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]


def plans(job: str, path: str, overrides: list[str], assumed: Assumed = Assumed()) -> list[Plan]:
    """The plan of a job, or of every stage of a chain.

    Args:
        job: a name or a script, such as jobs/train_diffusion.py; or "chain".

    Raises:
        UserError: there is no such job, or the config is not one of it.
    """
    name = Path(job).stem
    if name == "chain":
        from rayproj import chain

        stages = [stage for together in chain.stages_of(chain.load(path, overrides)) for stage in together]
        return [plan(sys.modules[main.__module__], stage, assumed) for main, stage in stages]
    known = sorted(module.name for module in pkgutil.iter_modules(import_module("rayproj.jobs").__path__))
    if name not in known:
        raise UserError(f"There is no job '{job}'; give one of {', '.join(known)}, or chain.")
    module = import_module(f"rayproj.jobs.{name}")
    if not hasattr(module, "Config"):
        raise UserError(
            f"The job '{name}' has no config, so there is nothing to plan; see python jobs/{name}.py --help."
        )
    return [plan(module, configuration.load(module.Config, path, overrides), assumed)]


def print_plans(job: str, path: str, overrides: list[str], assumed: Assumed, as_json: bool) -> int:
    found = plans(job, path, overrides, assumed)
    if as_json:
        print(to_json([{**asdict(one), "peak": one.peak, "disk": one.disk} for one in found]).decode(), end="")
    else:
        print("\n\n".join(map(show, found)))
    return 0
