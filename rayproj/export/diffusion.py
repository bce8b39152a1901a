"""Diffusion models and autoencoders in the formats of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path as File
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.diffusion.autoencoder import Codec
from rayproj.diffusion.conditions import LABEL
from rayproj.diffusion.denoiser import Network
from rayproj.diffusion.process import BETAS, STEPS, Path, Prediction, Process
from rayproj.diffusion.task import DiffusionConfig, TrainedModel
from rayproj.engine.checkpoint import load_ema
from rayproj.errors import UserError
from rayproj.export.card import Card, describe, guarantees, last_part, no_guarantee
from rayproj.storage.store import Store, from_json, to_json


def write_pipeline(run: Store, folder: File) -> Card:
    from rayproj.export import pipeline

    model = TrainedModel(run.uri, "cpu")
    if model.conditions.text and not model.conditions.values and model.denoiser.embedding.whole_text is None:
        return _write_stable_diffusion(run, model, folder)
    conditions, network = model.conditions, model.denoiser.kind
    if conditions.text or conditions.low or set(conditions.values) != {LABEL} or network is Network.mmdit:
        also = [*(["text"] if conditions.text else []), *(["low"] if conditions.low else [])]
        raise UserError(
            "A U-Net or DiT of a class label and nothing else is exported as a pipeline, and this run has a "
            f"{network.value} of {', '.join([*conditions.values, *also])}; draw with jobs/generate.py."
        )
    scheduler = _scheduler(model.process)
    header, vae, net = model.header, _vae(model.codec), model.denoiser.net
    if not model.denoiser.makes_own_vector:  # then as diffusers itself has labels
        net.class_embedding = model.denoiser.embedding.values[LABEL]
        net.register_to_config(class_embed_type=None, num_class_embeds=conditions.values[LABEL] + 1)
    autoencoder = Store(header.provenance["autoencoder"])
    images = header.provenance["images"]
    # Raised before anything long is done, and before anything is written that lacks it.
    privacy = guarantees(run, images)
    if network is Network.unet:
        net.register_to_config(sample_size=list(model.latent_shape[1:]))
    names = {str(number): name for number, name in enumerate(header.classes)}
    whole = pipeline.ClassToImagePipeline(vae, net, scheduler, names)
    whole.save_pretrained(folder)
    shutil.copy(pipeline.__file__, folder / "pipeline.py")
    # With the file's name beside the class's, diffusers finds the code here without being told of it.
    index = from_json((folder / "model_index.json").read_bytes())
    index["_class_name"] = ["pipeline", pipeline.ClassToImagePipeline.__name__]
    (folder / "model_index.json").write_bytes(to_json(index))

    preview = configuration.section(DiffusionConfig, run.read("config.yaml"), "diffusion").preview
    shape = "x".join(map(str, from_json(autoencoder.read("result.json"))["image_shape"]))
    code = f"""
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)  # runs pipeline.py
labels = {json.dumps(list(header.classes[:2]), ensure_ascii=False)}
images = pipeline(labels, num_inference_steps={preview.steps}, guidance_scale={preview.guidance}).images
"""
    learned = _data_of(autoencoder)
    return Card(
        about=f"Class-conditional latent diffusion ({_about(model.process)}) of images of {shape} (channels, height, "
        f"width), as a diffusers pipeline with its own code in `pipeline.py`. The classes: {', '.join(header.classes)}.",
        library="diffusers",
        tags=["latent-diffusion", "class-conditional", "synthetic-data", "rayproj"],
        code=code,
        commit=model.commit,
        data=[describe(header, "Denoiser"), learned],
        privacy=[*privacy, no_guarantee("the data of the autoencoder (`vae/`)")],
    )


# Of diffusers' schedulers of discrete steps.
KINDS = {Prediction.noise: "epsilon", Prediction.data: "sample", Prediction.v: "v_prediction"}


def _scheduler(process: Process) -> Any:
    """The scheduler of diffusers that goes along a process.

    Raises:
        UserError: there is none.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if (process.path, process.predicts) == (Path.flow, Prediction.velocity):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=1.0)
    if process.path not in BETAS or process.predicts not in KINDS:
        raise UserError(
            "A model is exported as a pipeline if its diffusion.process has path=flow and predicts=velocity, or one of the "
            f"paths {', '.join(path.value for path in BETAS)}; this run has {process.path.value} and "
            f"{process.predicts.value}. Draw with jobs/generate.py."
        )
    low, high = BETAS[process.path]
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_start=low,
        beta_end=high,
        beta_schedule=process.path.value,
        clip_sample=False,
        prediction_type=KINDS[process.predicts],
        timestep_spacing="trailing",
        steps_offset=1,
    )


def _about(process: Process) -> str:
    return (
        "rectified flow"
        if process.path is Path.flow
        else f"path {process.path.value}, predicts {process.predicts.value}"
    )


def _write_stable_diffusion(run: Store, model: TrainedModel, folder: File) -> Card:
    """A fine-tuned Stable Diffusion pipeline as what it was: one that diffusers itself can load.

    Raises:
        UserError: the process or the latents are not those of Stable Diffusion.
    """
    from diffusers import StableDiffusionPipeline

    own = {"mean": model.codec.mean.flatten().tolist(), "std": model.codec.std.flatten().tolist()}
    scale, vae = model.codec.model.vae.config.get("scaling_factor", 1.0), model.codec.model.vae
    theirs = [1 / scale] * len(own["std"])
    same = all(abs(a - b) < 1e-5 * b for a, b in zip(own["std"], theirs, strict=True)) and not any(own["mean"])
    if model.process.path is not Path.scaled_linear or model.process.predicts not in KINDS or not same:
        raise UserError(
            "A text-to-image model is exported as a Stable Diffusion pipeline, with diffusion.process.path=scaled_linear "
            "and autoencoder.weights of such a pipeline; this run has others. Draw with jobs/generate.py."
        )
    images, autoencoder = model.header.provenance["images"], Store(model.header.provenance["autoencoder"])
    privacy = guarantees(run, images)
    words = model.text.tokenizer
    words.model_max_length = model.conditions.text[0]
    pipeline = StableDiffusionPipeline(
        vae,
        model.text.model,
        words,
        model.denoiser.net,
        _scheduler(model.process),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    code = """
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(".")
images = pipeline(["a picture"], num_inference_steps=25, guidance_scale=7.5).images
"""
    return Card(
        about="Text-to-image latent diffusion, fine-tuned from the weights of a Stable Diffusion pipeline; adapters, if "
        "there were any, are merged. There is no safety checker.",
        library="diffusers",
        tags=["latent-diffusion", "text-to-image", "stable-diffusion", "synthetic-data", "rayproj"],
        code=code,
        commit=model.commit,
        data=[describe(model.header, "Denoiser"), _data_of(autoencoder)],
        privacy=[*privacy, no_guarantee("the data of the pipeline that it started from")],
    )


def write_autoencoder(run: Store, folder: File) -> Card:
    codec = Codec.load(run.uri, "cpu")
    _vae(codec).save_pretrained(folder / "vae")
    result = from_json(run.read("result.json"))
    shape = result["image_shape"]
    code = f"""
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".", subfolder="vae")
images = torch.rand(2, {", ".join(map(str, shape))}) * 2 - 1  # in [-1, 1]
with torch.no_grad():
    latents = vae.encode(images).latent_dist.mean  # (latents - latents_mean) / latents_std has variance one
    decoded = vae.decode(latents).sample
"""
    return Card(
        about=f"The autoencoder of a latent diffusion model, for images of {'x'.join(map(str, shape))} (channels, height, "
        "width) in [-1, 1]; its config has mean and standard deviation of the latents, per channel.",
        library="diffusers",
        tags=["autoencoder", "rayproj"],
        code=code,
        commit=load_ema(run)[1],
        data=[_data_of(run)],
        privacy=[no_guarantee("the data of the autoencoder")],
    )


def _vae(codec: Codec) -> Any:
    """The AutoencoderKL, with the latents' scale in its config."""
    # A factor of 1, because the default is Stable Diffusion's, and other pipelines apply it beside mean and deviation.
    codec.model.vae.register_to_config(
        latents_mean=codec.mean.flatten().tolist(), latents_std=codec.std.flatten().tolist(), scaling_factor=1.0
    )
    return codec.model.vae


def _data_of(autoencoder: Store) -> str:
    """A sentence on what an autoencoder learned from; its dataset may be gone by now."""
    data = configuration.value(autoencoder.read("config.yaml"), "data")
    if not Store(data).exists("dataset.json"):
        return f"Autoencoder: `{last_part(data)}`."
    return describe(Dataset.open(data).header, "Autoencoder")
