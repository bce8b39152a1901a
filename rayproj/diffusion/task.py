"""Conditional latent diffusion as a Task, and a trained model as a sampler of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj import keyed
from rayproj.config import below
from rayproj.data.dataset import Dataset, Header
from rayproj.data.reader import Reader
from rayproj.diffusion import process, sampling
from rayproj.diffusion.adapters import LoraConfig, adapt, merge
from rayproj.diffusion.autoencoder import Codec
from rayproj.diffusion.conditions import LABEL, LOW, TEXT, Condition, ConditionConfig, Conditions, learned
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, Network, pixels_together, remembering
from rayproj.diffusion.process import Process, ProcessConfig, TimeDensity
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.engine.checkpoint import Commit, load_ema
from rayproj.engine.compiling import need_compiler
from rayproj.engine.engine import load_flat
from rayproj.engine.task import Batch, pattern_problems, train_only
from rayproj.engine.training import TrainConfig
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.frechet import FeatureStatistics, frechet_distance
from rayproj.storage.store import Store

VALIDATED = 8  # times at which the loss on held-out examples is measured


@dataclass
class DiffusionConfig:
    """What is learned, from which latents."""

    latents: str = "???"  # the dataset that jobs/encode_latents.py wrote
    # Further ones: of images of other shapes, which have batches of their own (the largest is `latents`); or of the same,
    # such as of images without labels, which are in every batch.
    buckets: list[str] = field(default_factory=list)
    init: str = ""  # run dir of a trained model to start from
    trainable: str = ""  # regular expression: parameters in whose names it is found are trained, the others stay
    lora: LoraConfig = field(default_factory=LoraConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    conditions: dict[str, ConditionConfig] = field(default_factory=dict)  # "label", "text", properties; {}: the label
    validation: str = ""  # held-out latents, for train.validate_every
    validation_samples: int = 256  # as many of them
    # Of those, images drawn anew under the same conditions as `preview` says, for the Fréchet distance of the two sets; it
    # depends on their number. 0: none.
    validation_drawn: int = 0
    prompts: list[str] = field(default_factory=list)  # of the previews, if there is text
    time_density: TimeDensity = TimeDensity.logit_normal  # of the training times; 1 is pure noise
    time_mean: float = 0.0  # of their logit, where that is normal
    time_std: float = 1.0
    time_mixture: list[list[float]] = field(default_factory=list)  # [low, high, weight] of each uniform of a mixture
    preview: SamplerConfig = field(default_factory=SamplerConfig)

    @property
    def conditioned(self) -> dict[str, ConditionConfig]:
        return self.conditions or {LABEL: ConditionConfig()}

    def problems(self) -> list[str]:
        if wrong := pattern_problems(self.trainable, "diffusion.trainable"):
            return wrong
        if self.lora.rank and (self.trainable or not self.init):
            return ["diffusion.lora.rank goes with diffusion.init, and not with diffusion.trainable."]
        if wrong := below(1, "diffusion", self, "validation_samples"):
            return wrong
        if self.time_std <= 0:
            return [f"diffusion.time_std must be positive, not {self.time_std:g}."]
        if (self.time_density is TimeDensity.mixture) != bool(self.time_mixture):
            return ["diffusion.time_mixture goes with diffusion.time_density=mixture: a list of [low, high, weight]."]
        if self.validation_drawn and not 2 <= self.validation_drawn <= self.validation_samples:
            return ["diffusion.validation_drawn is 0, or from 2 to diffusion.validation_samples."]
        sound = (len(p) == 3 and 0 <= p[0] < p[1] <= 1 and p[2] > 0 for p in self.time_mixture)
        return [] if all(sound) else ["diffusion.time_mixture: each is [low, high, weight], 0 <= low < high <= 1."]


class DiffusionTask:
    """Denoising of cached latents: rectified flow, or another process.

    Args:
        latents: the header of the latent dataset, which has the field "moments" [2C, h, w]: mean and standard
            deviation of the scaled latent.
        codec: decodes previews; None for no previews.
        held_out: examples to validate on; None for none.

    Raises:
        UserError: the latents lack what the model is to be conditioned on.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        latents: Header,
        seed: int,
        codec: Codec | None = None,
        held_out: Batch | None = None,
    ) -> None:
        self.config, self.header, self.seed = config, latents, seed
        self.codec, self.held_out = codec, held_out
        self.text: TextEncoder | None = None  # of the previews' prompts
        self.shown: Callable[[np.ndarray], np.ndarray] | None = None
        self.process = Process(config.process)
        self.starts_trained = bool(config.init or config.denoiser.weights)
        double, *sides = latents.fields["moments"].shape
        self.latent_shape = (double // 2, *sides)
        self.conditions = Conditions.of(config.conditioned, latents)

    @property
    def fields(self) -> list[str]:
        """Of the latents, which a batch must have."""
        captions = [f"{TEXT}_{name}" for name in self.config.conditioned.get(TEXT, ConditionConfig()).captions]
        return ["moments", *self.conditions.values, *captions, *([LOW] if self.conditions.low else [])]

    def take(self, shapes: Sequence[Header]) -> None:
        """Make sure that these latents can be learned from too.

        Raises:
            UserError: they cannot.
        """
        denoiser, channels = self.config.denoiser, self.header.fields["moments"].shape[0]
        several = any(header.fields["moments"].shape != self.header.fields["moments"].shape for header in shapes)
        if several and (denoiser.network is not Network.unet or denoiser.weights):
            raise UserError(
                "diffusion.buckets of other shapes are for a U-Net of our own: denoiser.network=unet, without "
                "denoiser.weights."
            )
        halved = 2 ** (len(denoiser.channels) - 1)
        for header in shapes:
            found, *sides = header.fields["moments"].shape
            same = Conditions.of(self.config.conditioned, header) == self.conditions
            if not same or found != channels or header.classes != self.header.classes:
                raise UserError(
                    f"'{header.name}' of diffusion.buckets has other classes, conditions or channels than "
                    f"'{self.header.name}'; encode both with the same autoencoder, text and properties."
                )
            if any(side % halved for side in sides):
                raise UserError(
                    f"The latents of '{header.name}' are {sides[0]}x{sides[1]}, and {len(denoiser.channels)} levels of "
                    f"denoiser.channels take multiples of {halved}; choose other source.buckets."
                )

    def show(self, device: str, train: TrainConfig, shown: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        """Get what it takes to make previews and to validate on a device, as far as they are asked for.

        Args:
            shown: makes of previews uint8 [n, C, H, W] what may be shown, such as `Safety.greyed`.

        Raises:
            UserError: the autoencoder, the text encoder or the held-out latents are gone, or do not fit.
        """
        drawn = train.validate_every and self.config.validation and self.config.validation_drawn
        if train.preview_every or drawn:
            self.codec = Codec.load(self.header.provenance["autoencoder"], device)
        if train.preview_every:
            self.text = encoder_of(self.header, device) if self.config.prompts else None
            self.shown = shown
        if train.validate_every and self.config.validation:
            self.held_out = held_out(self.config, self.fields, device)

    def build(self) -> nn.Module:
        return self._network(self.config.init)

    def network(self) -> nn.Module:
        """The model with no regard to what it starts from, which may not be there yet."""
        return self._network("")

    def _network(self, init: str) -> nn.Module:
        torch.manual_seed(self.seed)
        model = Denoiser(self.config.denoiser, self.latent_shape, self.conditions)
        if init:
            start, _ = trained(Store(init), self.latent_shape, self.conditions)
            load_flat(model, {name: tensor.flatten() for name, tensor in start.state_dict().items()})
        if self.config.lora.rank:
            adapt(model, self.config.lora, self.seed)
            return model
        train_only(model, self.config.trainable, "diffusion.trainable", model.kept)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._errors(model, batch, self._times(batch["row"]), self.config.conditioned)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss on held-out examples at each of eight times, every example under its whole condition; and how far what is
        drawn under their conditions is from them, if it is asked for."""
        if self.held_out is None:
            return {}
        whole = {name: replace(config, dropout=0.0) for name, config in self.config.conditioned.items()}
        found: dict[str, float] = {}
        for k in range(VALIDATED):
            t = torch.full((len(self.held_out["row"]),), (k + 0.5) / VALIDATED, device=self.held_out["row"].device)
            batch = {name: tensor.clone() for name, tensor in self.held_out.items()}
            batch["row"][:, 2] = k
            parts = [{n: v[i : i + 64] for n, v in batch.items()} for i in range(0, len(t), 64)]
            errors = torch.cat([self._errors(model, part, t[: len(part["row"])], whole) for part in parts])
            found[f"val_loss_{t[0]:.2f}"] = errors.mean().item()
        found = {"val_loss": sum(found.values()) / VALIDATED, **found}
        if self.config.validation_drawn and self.codec:
            found["val_frechet_distance"] = self._distance(model, self.held_out, whole, self.codec)
        return found

    def _distance(self, model: nn.Module, batch: Batch, whole: dict[str, ConditionConfig], codec: Codec) -> float:
        """Between images drawn under the conditions of examples and these, both as the autoencoder has them, in the features
        of EfficientNet-lite0."""
        extractor, sets = EfficientNetLite0Features(device=str(batch["row"].device)), []
        for first in range(0, min(self.config.validation_drawn, len(batch["row"])), 64):
            part = {name: v[first : min(first + 64, self.config.validation_drawn)] for name, v in batch.items()}
            condition, ids = learned(whole, part, self.seed), part["row"][:, 0]
            drawn = draw(model, codec, condition, ids, self.latent_shape, self.seed, self.config.preview, self.process)
            sets.append([extractor(x).cpu() for x in (drawn, codec.decode(part["moments"].float().chunk(2, dim=1)[0]))])
        statistics = (FeatureStatistics.of(torch.cat(features).numpy()) for features in zip(*sets, strict=True))
        return frechet_distance(*statistics)

    def _errors(self, model: nn.Module, batch: Batch, t: Tensor, conditions: dict[str, ConditionConfig]) -> Tensor:
        row = batch["row"]
        mean, std = batch["moments"].float().chunk(2, dim=1)
        x0 = mean + std * keyed.normal(self.seed, "posterior", row, tuple(mean.shape[1:]))
        noise = keyed.normal(self.seed, "noise", row, tuple(mean.shape[1:]))
        condition = learned(conditions, batch, self.seed)
        out = model(self.process.input_of(self.process.noised(x0, noise, t), t), t, condition)
        errors = (out.float() - self.process.target(x0, noise, t)).square().flatten(1).mean(1)
        return self.process.weight(t) * errors

    def _times(self, row: Tensor) -> Tensor:
        config = self.config
        if config.time_density is TimeDensity.logit_normal:
            return process.logit_normal(keyed.normal(self.seed, "time", row), config.time_mean, config.time_std)
        u = keyed.uniform(self.seed, "time", row)
        return process.mixture_of_uniforms(u, config.time_mixture) if config.time_mixture else u

    def preview(self, model: nn.Module) -> np.ndarray | None:
        if self.codec is None or self.conditions.low:
            return None
        device, prompts = next(model.parameters()).device, self.config.prompts if self.text else []
        kinds = max(self.conditions.values.get(LABEL, 1), len(prompts))  # four images of each
        ids = torch.arange(4 * kinds, device=device)
        condition = self.conditions.nothing(len(ids), device)
        if LABEL in condition:
            condition[LABEL] = ids % self.conditions.values[LABEL]
        if prompts and self.text:
            condition[TEXT] = self.text(prompts)[ids % len(prompts)]
        images = draw(
            model, self.codec, condition, ids, self.latent_shape, self.seed, self.config.preview, self.process
        )
        found = images.cpu().numpy()
        return self.shown(found) if self.shown else found


def made_ready(denoiser: Denoiser, codec: Codec, config: SamplerConfig, device: str) -> sampling.Network:
    """A denoiser and the decoder as the sampler asks for them, in place, and what it calls for the denoiser.

    Raises:
        UserError: it asks for a compiled one, and there is no compiler.
    """
    if config.bf16:
        denoiser.bfloat16()
        codec.model.bfloat16()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        from rayproj.diffusion.fusing import fuse  # diffusers takes two seconds to import, on every driver and worker

        pixels_together(denoiser, codec.model)
        fuse(denoiser, codec.model)
    if config.compile:
        need_compiler("sampler.compile")
        denoiser.net.compile()
    return sampling.Graphs(denoiser) if on_gpu and config.graphs else denoiser


def draw(
    network: sampling.Network,
    codec: Codec,
    condition: Condition,
    ids: Tensor,
    latent_shape: tuple[int, ...],
    seed: int,
    config: SamplerConfig,
    process: Process,
    weak: sampling.Network | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """uint8 images [B, C, H, W] under a condition. The noise of an image is keyed by (seed, its id) alone.

    Args:
        weak: guides in the place of the model without its condition.
        scales: guidance of each [B], in the place of the sampler's.
    """
    row = torch.stack([ids, torch.zeros_like(ids), torch.zeros_like(ids)], dim=1)
    noise = keyed.normal(seed, "sample", row, latent_shape)
    guided = sampling.guided(network, config, weak, scales)
    with remembered(network, weak):
        latents = sampling.integrate(guided, noise, condition, config, process, unguided=network)
    return codec.decode(latents)


@contextmanager
def remembered(*networks: sampling.Network | None) -> Iterator[None]:
    """`remembering` of those that are denoisers as they are; a graph launches all that it once captured."""
    with ExitStack() as stack:
        for network in networks:
            if isinstance(network, Denoiser):
                stack.enter_context(remembering(network))
        yield


def trained(
    store: Store, latent_shape: tuple[int, ...], conditions: Conditions, ema: float = 0.0
) -> tuple[Denoiser, Commit]:
    """The averaged weights of a run's newest commit as a plain network, in which adapters are merged.

    Args:
        ema: width of an average that is put together from the commits; 0: the plain one.

    Raises:
        UserError: the run has no commit, its config describes another model, or it has no such average.
    """
    config = configuration.section(DiffusionConfig, store.read("config.yaml"), "diffusion")
    model = Denoiser(config.denoiser, latent_shape, conditions)
    if config.lora.rank:
        adapt(model, config.lora, seed=0)
    weights, commit = load_ema(store, ema)
    load_flat(model, weights)
    if config.lora.rank:
        merge(model)
    return model, commit


class TrainedModel:
    """A trained diffusion model with its codec, ready to draw.

    Raises:
        UserError: the run has no commit, or its latents or autoencoder are gone.
    """

    weak: TrainedModel | None = None  # see `guide_by`

    def __init__(self, run_dir: str, device: str, ema: float = 0.0) -> None:
        store = Store(run_dir)
        config = configuration.section(DiffusionConfig, store.read("config.yaml"), "diffusion")
        self.header = Dataset.open(config.latents).header
        task = DiffusionTask(config, self.header, seed=0)
        self.latent_shape, self.process, self.conditions = task.latent_shape, task.process, task.conditions
        self.denoiser, self.commit = trained(store, task.latent_shape, task.conditions, ema)
        self.denoiser.to(device).eval().requires_grad_(False)
        self.network: sampling.Network = self.denoiser
        self.codec = Codec.load(self.header.provenance["autoencoder"], device)
        self.device = device

    def draws(self, image_shape: tuple[int, ...]) -> None:
        """Draw images [C, H, W] of this shape from now on."""
        channels = self.latent_shape[0]
        self.latent_shape = (channels, *(side // self.codec.factor for side in image_shape[1:]))

    def guide_by(self, weak: TrainedModel) -> None:
        """Take a weaker model's output where guidance asks for that without a condition (Karras et al. 2024).

        Raises:
            UserError: it is of other latents, conditions or outputs.
        """
        ours, theirs = (
            (m.latent_shape, m.conditions, m.process.config, m.header.provenance["autoencoder"]) for m in (self, weak)
        )
        if ours != theirs:
            raise UserError(
                "generate.weak is to be a model of the same latents, conditions and process as generate.model, only smaller "
                "or trained for less; this one differs."
            )
        self.weak = weak

    @cached_property
    def text(self) -> TextEncoder:
        """The encoder of the captions that the model was trained with.

        Raises:
            UserError: it is gone, or another by now.
        """
        return encoder_of(self.header, self.device)

    def prepare(self, config: SamplerConfig) -> None:
        """Make the network what the sampler asks for.

        Raises:
            UserError: it asks for a compiled one, and there is no compiler.
        """
        if self.weak:
            self.weak.prepare(config)
        self.network = made_ready(self.denoiser, self.codec, config, self.device)

    def draw(
        self, condition: Condition, ids: Tensor, seed: int, config: SamplerConfig, scales: Tensor | None = None
    ) -> Tensor:
        """As `draw`."""
        weak = self.weak.network if self.weak else None
        return draw(
            self.network, self.codec, condition, ids, self.latent_shape, seed, config, self.process, weak, scales
        )

    def redraw(self, images: Tensor, ids: Tensor, seed: int, config: SamplerConfig, noise: float) -> Tensor:
        """uint8 images [B, C, H, W] noised up to a share of the path and drawn again from there, without a condition (Meng
        et al. 2022, "SDEdit"). What is drawn is keyed by (seed, id)."""
        latents, _ = self.codec.encode(images)
        row = torch.stack([ids, torch.zeros_like(ids), torch.zeros_like(ids)], dim=1)
        drawn = keyed.normal(seed, "redraw", row, tuple(latents.shape[1:]))
        nothing = self.conditions.nothing(len(images), self.device)
        with remembered(self.network, None):
            found = sampling.integrate(self.network, drawn, nothing, config, self.process, x0=latents, begin=noise)
        return self.codec.decode(found)


def held_out(config: DiffusionConfig, fields: list[str], device: str) -> Batch:
    """The examples to validate on.

    Raises:
        UserError: there are no such latents, or without what the model is conditioned on.
    """
    dataset = Dataset.open(config.validation)
    if missing := sorted(set(fields) - set(dataset.header.fields)):
        raise UserError(
            f"diffusion.validation='{config.validation}' has no field '{missing[0]}', which the model needs."
        )
    columns = Reader(dataset, fields).gather(np.arange(min(config.validation_samples, dataset.header.num_samples)))
    index = torch.from_numpy(columns.pop("index"))
    row = torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=1)
    return {"row": row.to(device), **{name: torch.from_numpy(v).to(device) for name, v in columns.items()}}


def encoder_of(latents: Header, device: str) -> TextEncoder:
    """The text encoder of a dataset of latents.

    Raises:
        UserError: it is gone, or another by now.
    """
    said = latents.provenance[TEXT]
    encoder = TextEncoder(configuration.from_dict(TextConfig, {k: v for k, v in said.items() if k != "digest"}), device)
    if encoder.digest != said["digest"]:
        raise UserError(
            f"The text encoder '{said['encoder'] or 'all-MiniLM-L6-v2'}' has other weights than when '{latents.name}' was "
            "made; put the old ones back, or encode the latents anew and train on them."
        )
    return encoder
