"""Images of a class from a latent diffusion model. This file travels with the weights: it needs diffusers alone.

pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipeline(["Trouser", "Bag"]).images
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ClassToImagePipeline(DiffusionPipeline):
    """Class-conditional sampling with classifier-free guidance.

    The latents have mean zero and standard deviation one per channel; `latents_mean` and `latents_std` of the VAE's config
    undo that. With the flow-matching scheduler x_t = (1 - t) x_0 + t noise, and the denoiser gives dx/dt at timestep 1000 t;
    with the other, the scheduler's config says what it gives.

    Args:
        vae: between images in [-1, 1] and latents.
        denoiser: its last class embedding stands for "no class".
        scheduler: of flow matching, whose sigma is our time t, from 1 (noise) to 0 (data); or of discrete steps.
        id2label: name of each class by its number in decimal.
    """

    model_cpu_offload_seq = "denoiser->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        denoiser: UNet2DModel | DiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | DDIMScheduler,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor()

    @property
    def num_classes(self) -> int:
        known = self.denoiser.config
        return (
            known.num_embeds_ada_norm
            if isinstance(self.denoiser, DiTTransformer2DModel)
            else known.num_class_embeds - 1
        )

    def class_ids(self, class_labels: int | str | list[int | str]) -> list[int]:
        """Numbers of classes that are given by number or name.

        Raises:
            ValueError: there is no such class; the message names those there are.
        """
        names = self.config.id2label or {}
        known = {name: int(number) for number, name in names.items()}
        known.update({number: number for number in range(self.num_classes)})
        wanted = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
        unknown = [label for label in wanted if label not in known]
        if unknown:
            raise ValueError(f"There is no class {unknown[0]!r}; the classes are {names}.")
        return [known[label] for label in wanted]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int = 16,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: names or numbers.
            num_inference_steps: equal steps from noise to data, one evaluation of the denoiser in each.
            guidance_scale: 1 is the conditional model alone.
            generator: of the initial noise, and of nothing else.
            latents: the initial noise itself [B, C, h, w], in place of the generator.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent" (scaled).
        """
        device = self._execution_device
        label = torch.tensor(self.class_ids(class_labels), device=device)
        null = torch.full_like(label, self.num_classes)
        channels, size = self.denoiser.config.in_channels, self.denoiser.config.sample_size
        shape = (len(label), channels, *((size, size) if isinstance(size, int) else size))
        # fp32 whatever the networks' precision: the steps add up small differences.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}.")
        x = latents.to(device, torch.float32)

        def predicted(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            dtype = self.denoiser.dtype
            out = self.denoiser(x.to(dtype), t.to(dtype).expand(len(x)), class_labels=label).sample
            return out[:, :channels].float()  # some predict variances too

        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # The scheduler's own choice of sigmas would end at 1/1000.
            sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            if guidance_scale == 1:
                out = predicted(x, t, label)
            else:
                given, without = predicted(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([label, null])).chunk(2)
                out = without + guidance_scale * (given - without)
            x = self.scheduler.step(out, t, x).prev_sample

        if output_type == "latent":
            images = x
        else:
            mean, std = (
                torch.tensor(values, device=device)[:, None, None]
                for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
            )
            decoded = self.vae.decode((x * std + mean).to(self.vae.dtype)).sample
            images = self.image_processor.postprocess(decoded.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
