"""Class-conditional latent diffusion as a Task, and a trained model as a sampler of images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj import keyed
from rayproj.data.dataset import Dataset, Header
from rayproj.diffusion import flow
from rayproj.diffusion.autoencoder import Codec
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig
from rayproj.diffusion.flow import SamplerConfig
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.engine import load_flat
from rayproj.engine.task import Batch
from rayproj.storage.store import Store


@dataclass
class DiffusionConfig:
    """What is learned, from which latents."""

    latents: str = "???"  # the dataset that jobs/encode_latents.py wrote
    init: str = ""  # run dir of a trained model to start from
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    label_dropout: float = 0.1  # share of examples trained without their label, for guidance
    time_mean: float = 0.0  # of the logit of the training times
    time_std: float = 1.0
    preview: SamplerConfig = field(default_factory=SamplerConfig)


class DiffusionTask:
    """Rectified-flow matching on cached latents.

    Args:
        latents: the header of the latent dataset, which has the field "moments" [2C, h, w]: mean and standard
            deviation of the scaled latent.
        codec: decodes previews; None for no previews.
    """

    def __init__(self, config: DiffusionConfig, latents: Header, seed: int, codec: Codec | None = None) -> None:
        self.config, self.seed, self.codec = config, seed, codec
        double, *sides = latents.fields["moments"].shape
        self.latent_shape = (double // 2, *sides)
        self.num_classes = len(latents.classes)

    def network(self) -> nn.Module:
        """The model as it is before any training."""
        torch.manual_seed(self.seed)
        return Denoiser(self.config.denoiser, self.latent_shape, self.num_classes)

    def build(self) -> nn.Module:
        model = self.network()
        if self.config.init:
            load_flat(model, load_ema(Store(self.config.init))[0])
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        row = batch["row"]
        mean, std = batch["moments"].float().chunk(2, dim=1)
        x0 = mean + std * keyed.normal(self.seed, "posterior", row, self.latent_shape)
        noise = keyed.normal(self.seed, "noise", row, self.latent_shape)
        t = flow.logit_normal(keyed.normal(self.seed, "time", row), self.config.time_mean, self.config.time_std)
        dropped = keyed.uniform(self.seed, "label_dropout", row) < self.config.label_dropout
        label = torch.where(dropped, self.num_classes, batch["label"])
        velocity = model(flow.noised(x0, noise, t), t, label)
        return (velocity.float() - flow.velocity_target(x0, noise)).square().flatten(1).mean(1)

    def preview(self, model: nn.Module) -> np.ndarray | None:
        if self.codec is None:
            return None
        labels = torch.arange(4 * self.num_classes, device=next(model.parameters()).device) % self.num_classes
        return draw(model, self.codec, labels, self.latent_shape, self.seed, self.config.preview).cpu().numpy()


def draw(
    denoiser: nn.Module,
    codec: Codec,
    labels: Tensor,
    latent_shape: tuple[int, ...],
    seed: int,
    config: SamplerConfig,
    ids: Tensor | None = None,
) -> Tensor:
    """uint8 images [B, C, H, W] of the given labels [B].

    The noise of an image is keyed by (seed, its id) alone; ids [B] default to 0..B-1.
    """
    ids = torch.arange(len(labels), device=labels.device) if ids is None else ids
    row = torch.stack([ids, torch.zeros_like(ids), torch.zeros_like(ids)], dim=1)
    noise = keyed.normal(seed, "sample", row, latent_shape)
    velocity = flow.guided(denoiser, int(denoiser.num_classes), config.guidance)  # type: ignore[arg-type]
    return codec.decode(flow.integrate(velocity, noise, labels, config))


class TrainedModel:
    """A trained diffusion model with its codec, ready to draw.

    Raises:
        UserError: the run has no commit, or its latents or autoencoder are gone.
    """

    def __init__(self, run_dir: str, device: str) -> None:
        store = Store(run_dir)
        config = configuration.section(DiffusionConfig, store.read("config.yaml"), "diffusion")
        self.header = Dataset.open(config.latents).header
        task = DiffusionTask(config, self.header, seed=0)
        self.latent_shape = task.latent_shape
        self.denoiser = Denoiser(config.denoiser, task.latent_shape, task.num_classes)
        weights, self.commit = load_ema(store)
        load_flat(self.denoiser, weights)
        self.denoiser.to(device).eval().requires_grad_(False)
        self.codec = Codec.load(self.header.provenance["autoencoder"], device)

    def draw(self, labels: Tensor, ids: Tensor, seed: int, config: SamplerConfig) -> Tensor:
        return draw(self.denoiser, self.codec, labels, self.latent_shape, seed, config, ids)
