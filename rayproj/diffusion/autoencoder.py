"""The autoencoder whose latents the diffusion model learns (Rombach et al. 2022, "High-Resolution Image Synthesis with
Latent Diffusion Models", section 3.1), as a Task, and the codec that the later stages use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj import keyed
from rayproj.config import below
from rayproj.diffusion import others
from rayproj.diffusion.perceptual import PatchCritic, PerceptualDistance
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.engine import load_flat
from rayproj.engine.task import Batch
from rayproj.errors import UserError
from rayproj.storage.store import Store, from_json

NO_VARIANCE = -60.0  # logarithm of it


@dataclass
class AutoencoderConfig:
    """A diffusers `AutoencoderKL`. Every level but the last halves height and width."""

    # A folder of diffusers with an `AutoencoderKL` or `AutoencoderTiny`, such as the vae of a pipeline: the network, its
    # size, the scale of its latents and the weights to start from, in place of the sizes here. train.steps=0 takes it as is.
    weights: str = ""
    channels: tuple[int, ...] = (16, 32, 32)
    layers_per_block: int = 1
    norm_groups: int = 8
    latent_channels: int = 4
    kl_weight: float = 1e-4  # of the mean KL divergence per latent element
    perceptual: float = 0.0  # weight of the distance in a network's features, 1 or less
    adversarial: float = 0.0  # weight of a critic's opinion, 0.1 or less; it is trained beside the autoencoder
    adversarial_from: int = 0  # step from which that counts, when images are about right

    def problems(self) -> list[str]:
        if small := below(1, "autoencoder", self, "layers_per_block", "norm_groups", "latent_channels"):
            return small
        found = [
            f"autoencoder.channels: {c} is not a multiple of autoencoder.norm_groups={self.norm_groups}."
            for c in self.channels
            if c % self.norm_groups
        ]
        names = ("kl_weight", "perceptual", "adversarial")
        return found + [f"autoencoder.{n} must not be negative." for n in names if getattr(self, n) < 0]


@dataclass(frozen=True)
class Network:
    """An autoencoder of diffusers as a config describes it, before it is built."""

    kind: str  # the class
    factor: int  # pixels of a side for a latent pixel
    latent_channels: int
    mean: list[float]  # of latents, per channel, as whoever trained it scaled them; [] where that is to be measured
    std: list[float]


def described(config: AutoencoderConfig, image_channels: int) -> Network:
    """What the config says, or the folder of weights that it names.

    Raises:
        UserError: there is no autoencoder in the folder, or one for other images.
    """
    if not config.weights:
        factor = 2 ** (len(config.channels) - 1)
        return Network("AutoencoderKL", factor, config.latent_channels, [], [])
    said = others.config_of(config.weights, "autoencoder.weights")
    kind, channels = said.get("_class_name"), said.get("latent_channels", 4)
    blocks = {"AutoencoderKL": "block_out_channels", "AutoencoderTiny": "encoder_block_out_channels"}
    if kind not in blocks or said.get("in_channels", 3) != image_channels:
        raise UserError(
            f"autoencoder.weights='{config.weights}' is a {kind} of {said.get('in_channels', 3)} channels; it must be an "
            f"AutoencoderKL or AutoencoderTiny of {image_channels}, as the images are (source.channels=rgb makes them 3)."
        )
    scale = said.get("scaling_factor") or 1.0
    mean = said.get("latents_mean") or [said.get("shift_factor") or 0.0] * channels
    std = [value / scale for value in said.get("latents_std") or [1.0] * channels]
    return Network(kind, 2 ** (len(said[blocks[kind]]) - 1), channels, mean, std)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] to fp32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Autoencoder(nn.Module):
    """Images to the moments of a diagonal Gaussian over latents, and back."""

    def __init__(self, config: AutoencoderConfig, image_channels: int) -> None:
        super().__init__()
        from diffusers import AutoencoderKL, AutoencoderTiny

        levels, network = len(config.channels), described(config, image_channels)
        self.factor = network.factor
        self.vae: Any
        if config.weights:
            kind = AutoencoderKL if network.kind == "AutoencoderKL" else AutoencoderTiny
            self.vae = others.load(kind, config.weights, "autoencoder.weights")
        else:
            self.vae = AutoencoderKL(
                in_channels=image_channels,
                out_channels=image_channels,
                latent_channels=config.latent_channels,
                block_out_channels=tuple(config.channels),
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_groups,
                mid_block_add_attention=False,
            )
        if config.adversarial:
            self.critic = PatchCritic(image_channels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, fp32, each [B, latent_channels, h, w], of images in [-1, 1]."""
        found = self.vae.encode(x.to(self.vae.dtype))
        if not hasattr(found, "latent_dist"):  # an AutoencoderTiny has no posterior
            mean = found.latents.float()
            return mean, torch.full_like(mean, NO_VARIANCE)
        return found.latent_dist.mean.float(), found.latent_dist.logvar.float()

    def decode(self, z: Tensor) -> Tensor:
        """fp32 images in about [-1, 1]."""
        image: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return image.float()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction through a sampled latent, and the posterior's mean and log-variance."""
        mean, logvar = self.encode(x)
        return self.decode(mean + torch.exp(0.5 * logvar) * noise), mean, logvar


class AutoencoderTask:
    """L1 + L2 reconstruction and a small KL term, per example; perceptual and adversarial terms where they are asked for
    (Rombach et al. 2022, appendix G).

    Args:
        image_shape: [C, H, W] of the dataset's images.
        preview_images: uint8 [N, C, H, W] to show beside their reconstructions, or None.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        image_shape: tuple[int, ...],
        seed: int,
        preview_images: np.ndarray | None = None,
    ) -> None:
        self.config, self.image_shape, self.seed, self.preview_images = config, image_shape, seed, preview_images
        self.described = described(config, image_shape[0])
        self.starts_trained = bool(config.weights)
        self.perceptual = PerceptualDistance() if config.perceptual else None
        factor = self.described.factor
        if any(side % factor for side in image_shape[1:]):
            raise UserError(
                f"Images of {image_shape[1]}x{image_shape[2]} do not divide by {factor}; "
                "set the source's image_size to a multiple or use fewer autoencoder.channels."
            )
        self.latent_shape = (self.described.latent_channels, *(side // factor for side in image_shape[1:]))

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return Autoencoder(self.config, self.image_shape[0])

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        x = to_unit_range(batch["image"])
        reconstruction, mean, logvar = model(x, keyed.normal(self.seed, "posterior", batch["row"], self.latent_shape))
        error = (reconstruction - x).flatten(1)
        # KL(N(mean, var) || N(0, 1)) per element, Kingma and Welling 2014, appendix B.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
        found = error.abs().mean(1) + error.square().mean(1) + self.config.kl_weight * kl
        if self.perceptual:
            found = found + self.config.perceptual * self.perceptual(reconstruction, x)
        if self.config.adversarial:
            makers, critics = model.critic.losses(x, reconstruction)  # type: ignore[union-attr,operator]
            late = batch["row"][:, 1] >= self.config.adversarial_from
            found = found + self.config.adversarial * makers * late + critics * late
        return found

    @torch.no_grad()
    def preview(self, model: nn.Module) -> np.ndarray | None:
        if self.preview_images is None:
            return None
        assert isinstance(model, Autoencoder)
        device = next(model.parameters()).device
        x = to_unit_range(torch.from_numpy(self.preview_images)).to(device)
        return np.concatenate([self.preview_images, to_uint8(model.decode(model.encode(x)[0])).cpu().numpy()])


@torch.no_grad()
def measure(model: Autoencoder, images: Tensor, batch: int = 64) -> dict[str, Any]:
    """Per-channel mean and standard deviation of the latents, which scale them to unit variance for the diffusion
    model (Rombach et al. 2022, appendix G), and the reconstruction's PSNR in dB over uint8 images [N, C, H, W]."""
    means, errors = [], []
    for part in images.split(batch):
        mean, _ = model.encode(to_unit_range(part))
        error = to_uint8(model.decode(mean)).double() - part.double()
        means.append(mean.double().cpu())
        errors.append(error.square().flatten(1).mean(1).cpu())
    latents = torch.cat(means).transpose(0, 1).flatten(1)
    mse = torch.cat(errors).mean()
    return {
        "latent_mean": latents.mean(1).tolist(),
        "latent_std": latents.std(1).tolist(),
        "psnr": float(10 * torch.log10(255.0**2 / mse)),
    }


class Codec:
    """A trained autoencoder with its latents scaled to zero mean and unit variance per channel."""

    def __init__(self, model: Autoencoder, latent_mean: list[float], latent_std: list[float], device: str) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.factor = model.factor  # pixels in a latent pixel, along a side
        self.mean = torch.tensor(latent_mean, device=device)[:, None, None]
        self.std = torch.tensor(latent_std, device=device)[:, None, None]

    @classmethod
    def load(cls, run_dir: str, device: str) -> Codec:
        """From the run dir of a finished autoencoder training.

        Raises:
            UserError: the run is not there or not finished.
        """
        store = Store(run_dir)
        if not store.exists("result.json"):
            raise UserError(f"The autoencoder run '{run_dir}' is not finished; run jobs/train_autoencoder.py on it.")
        result = from_json(store.read("result.json"))
        config = configuration.section(AutoencoderConfig, store.read("config.yaml"), "autoencoder")
        model = Autoencoder(config, int(result["image_shape"][0]))
        load_flat(model, load_ema(store)[0])
        return cls(model, result["latent_mean"], result["latent_std"], device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of uint8 images [B, C, H, W]."""
        mean, logvar = self.model.encode(to_unit_range(images))
        return (mean - self.mean) / self.std, torch.exp(0.5 * logvar) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] of scaled latents."""
        return to_uint8(self.model.decode(latents * self.std + self.mean))
