"""The diffusion and autoencoder tasks keep the promises that private training and caching stand on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayproj import keyed
from rayproj.classifiers.networks import ClassifierConfig
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Field, Header
from rayproj.diffusion.adapters import LoraConfig, merge
from rayproj.diffusion.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderTask, Codec, measure, to_uint8
from rayproj.diffusion.conditions import ConditionConfig
from rayproj.diffusion.denoiser import DenoiserConfig
from rayproj.diffusion.process import Path as ProcessPath
from rayproj.diffusion.process import Prediction, Process, ProcessConfig, TimeDensity
from rayproj.diffusion.sampling import SamplerConfig, Solver, Spacing, integrate
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask, draw, made_ready
from rayproj.engine import memory
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.privacy.clipping import clipped_sum
from rayproj.privacy.plan import ClippingPath

LATENTS = Header("x", {"moments": Field("npy", (8, 4, 4)), "label": Field("int")}, 10, 5, tuple("abc"))
IMAGES = Header("x", {"image": Field("png", (1, 16, 16)), "label": Field("int")}, 10, 5, tuple("abc"))
SMALL = DiffusionConfig(latents="x", denoiser=DenoiserConfig(channels=(16, 32), head_dim=16, norm_groups=8))
TINY_AE = AutoencoderConfig(channels=(8, 8, 8), norm_groups=4)


def rows(size: int) -> torch.Tensor:
    return torch.stack([torch.arange(size), torch.full((size,), 2), torch.zeros(size, dtype=torch.long)], 1)


def batch_of(kind: str, size: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (size, 1, 16, 16), dtype=torch.uint8)
    data = {"moments": torch.randn(size, 8, 4, 4).abs()} if kind == "diffusion" else {"image": images}
    return {**data, "label": torch.arange(size) % 3, "row": rows(size)}


TASKS = {
    "diffusion": DiffusionTask(SMALL, LATENTS, seed=0),
    "autoencoder": AutoencoderTask(TINY_AE, (1, 16, 16), seed=0),
    "classifier": ClassificationTask(ClassifierConfig(channels=(8, 16), dropout=0.0), IMAGES, seed=0),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_loss_depends_on_its_own_example_alone(kind: str) -> None:
    task = TASKS[kind]
    model, batch = task.build(), batch_of(kind)
    whole = task.losses(model, batch)
    assert whole.shape == (4,) and whole.dtype == torch.float32
    alone = torch.cat([task.losses(model, {n: t[i : i + 1] for n, t in batch.items()}) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TASKS)
def test_a_model_in_bf16_has_nearly_the_same_losses_in_fp32(kind: str) -> None:
    task, batch = TASKS[kind], batch_of(kind)
    exact, rounded = (task.losses(model, batch) for model in (task.build(), task.build().bfloat16()))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kind", TASKS)
def test_the_model_is_a_function_of_the_seed(kind: str) -> None:
    first, second = TASKS[kind].build(), TASKS[kind].build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_diffusion_loss_written_out() -> None:
    task, batch = TASKS["diffusion"], batch_of("diffusion")
    assert isinstance(task, DiffusionTask)
    model = task.build()
    mean, std = batch["moments"][:, :4], batch["moments"][:, 4:]
    x0 = mean + std * keyed.normal(0, "posterior", batch["row"], (4, 4, 4))
    noise = keyed.normal(0, "noise", batch["row"], (4, 4, 4))
    t = torch.sigmoid(keyed.normal(0, "time", batch["row"]))
    dropped = keyed.uniform(0, "label_dropout", batch["row"]) < 0.1
    label = torch.where(dropped, -1, batch["label"])
    x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    expected = ((model(x, t, {"label": label}) - (noise - x0)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(task.losses(model, batch), expected)


@pytest.mark.parametrize(
    ("path", "predicts"),
    [(ProcessPath.cosine, Prediction.v), (ProcessPath.flow, Prediction.data), (ProcessPath.edm, Prediction.edm)],
)
def test_another_process_trains_and_draws(path: ProcessPath, predicts: Prediction) -> None:
    """A few steps on one latent of each class: what is drawn of a class is nearer to its own than to the others'."""
    process = ProcessConfig(path, predicts, min_snr=5.0)
    density = (-0.4, 1.2) if path is ProcessPath.edm else (0.0, 1.0)
    config = replace(
        SMALL,
        process=process,
        conditions={"label": ConditionConfig(dropout=0.0)},
        time_mean=density[0],
        time_std=density[1],
    )
    task = DiffusionTask(config, LATENTS, 0)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    moments = torch.zeros(3, 8, 4, 4)
    moments[:, :4] = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = {"moments": moments.repeat(16, 1, 1, 1), "label": torch.arange(48) % 3}
    for step in range(120):
        batch["row"] = torch.stack([torch.arange(48), torch.full((48,), step), torch.zeros(48).long()], 1)
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()
        optimizer.step()
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    sampler = SamplerConfig(12, Solver.dpmpp_2m, spacing=Spacing.karras, sigma_max=20.0)
    drawn = integrate(model.eval(), noise, {"label": torch.arange(3)}, sampler, task.process)
    distance = (drawn[:, None] - moments[None, :, :4]).square().flatten(2).mean(2)
    assert torch.equal(distance.argmin(1), torch.arange(3)) and distance.diagonal().max() < 0.3


def test_validation_is_the_loss_at_fixed_times_and_does_not_move() -> None:
    task = DiffusionTask(SMALL, LATENTS, 0, held_out=batch_of("diffusion", 70))
    model = task.build().eval()
    found = task.validate(model)
    assert found == task.validate(model) and len(found) == 9
    t, batch = torch.full((70,), 3.5 / 8), batch_of("diffusion", 70)
    row = batch["row"].clone()
    row[:, 2] = 3
    mean, std = batch["moments"].chunk(2, dim=1)
    x0 = mean + std * keyed.normal(0, "posterior", row, (4, 4, 4))
    noise = keyed.normal(0, "noise", row, (4, 4, 4))
    with torch.no_grad():
        velocity = model((1 - 3.5 / 8) * x0 + 3.5 / 8 * noise, t, {"label": batch["label"]})
    assert found["val_loss_0.44"] == pytest.approx((velocity - (noise - x0)).square().mean().item(), rel=1e-4)
    assert found["val_loss"] == pytest.approx(np.mean([v for n, v in found.items() if n != "val_loss"]))
    assert DiffusionTask(SMALL, LATENTS, 0).validate(model) == {}


def test_validation_draws_under_the_held_out_conditions() -> None:
    codec = Codec(AutoencoderTask(TINY_AE, (1, 16, 16), seed=0).build(), [0.0] * 4, [1.0] * 4, "cpu")  # type: ignore[arg-type]
    config = replace(SMALL, validation_drawn=66, preview=SamplerConfig(2))
    task = DiffusionTask(config, LATENTS, 0, codec=codec, held_out=batch_of("diffusion", 70))
    model, batch = task.build().eval(), {name: v[:66] for name, v in batch_of("diffusion", 70).items()}
    found = task.validate(model)["val_frechet_distance"]
    drawn = draw(
        model, codec, {"label": batch["label"]}, torch.arange(66), (4, 4, 4), 0, SamplerConfig(2), task.process
    )
    extract = EfficientNetLite0Features()
    sets = [extract(images).double() for images in (drawn, codec.decode(batch["moments"][:, :4]))]
    means, covariances = [s.mean(0) for s in sets], [torch.cov(s.T) for s in sets]
    # tr (S1 S2)^1/2 by the eigenvalues of the product itself.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots
    assert found == pytest.approx(expected.item(), rel=1e-3)
    silent = DiffusionTask(SMALL, LATENTS, 0, codec=codec, held_out=batch_of("diffusion", 70))
    assert "val_frechet_distance" not in silent.validate(model)


def test_labels_are_dropped_at_the_configured_rate() -> None:
    draws = keyed.uniform(0, "label_dropout", rows(20000)) < 0.1
    assert abs(draws.float().mean() - 0.1) < 4 * (0.09 / 20000) ** 0.5


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    torch.manual_seed(0)
    codec = Codec(Autoencoder(TINY_AE, 1), [0.0] * 4, [1.0] * 4, "cpu")
    model = TASKS["diffusion"].build().eval()
    labels, ids = torch.tensor([0, 1, 2, 0]), torch.tensor([5, 6, 7, 8])
    sampler, process = SamplerConfig(steps=3, guidance=2.0), Process(ProcessConfig())
    with torch.no_grad():
        whole = draw(model, codec, {"label": labels}, ids, (4, 4, 4), 3, sampler, process)
        alone = draw(model, codec, {"label": labels[2:3]}, ids[2:3], (4, 4, 4), 3, sampler, process)
    assert (whole[2].int() - alone[0].int()).abs().max() <= 1


@pytest.mark.parametrize("how", ["bf16", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_network_in_bf16_and_a_compiled_one_draw_nearly_the_same(how: str) -> None:
    torch.manual_seed(0)
    codec = Codec(Autoencoder(TINY_AE, 1), [0.0] * 4, [1.0] * 4, "cpu")
    labels, ids, process = torch.tensor([0, 1]), torch.tensor([5, 6]), Process(ProcessConfig())
    drawn = []
    for sampler in (SamplerConfig(3), SamplerConfig(3, **{how: True})):
        denoiser = TASKS["diffusion"].build().eval().requires_grad_(False)
        network = made_ready(denoiser, codec, sampler, "cpu")
        assert network is denoiser, "graphs are for GPUs"
        drawn.append(draw(network, codec, {"label": labels}, ids, (4, 4, 4), 3, sampler, process).int())
    difference = (drawn[0] - drawn[1]).abs()
    if how == "compile":
        assert difference.max() <= 1
    else:
        assert difference.max() > 0 and difference.float().mean() < 3


def test_recomputed_activations_give_the_same_gradients() -> None:
    found = {}
    for recompute in (False, True):
        task = DiffusionTask(replace(SMALL, denoiser=replace(SMALL.denoiser, recompute=recompute)), LATENTS, seed=0)
        model = task.build()
        task.losses(model, batch_of("diffusion")).mean().backward()
        found[recompute] = [p.grad for p in model.parameters()]
        parameters = list(model.named_parameters())
        model.zero_grad()
        clip = clipped_sum(model, task.losses, parameters, batch_of("diffusion"), 1, 0.3, 4, ClippingPath.bookkeeping)
        found[recompute].append(clip[0])
    for kept, again in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(kept, again, rtol=1e-4, atol=1e-6)


def test_the_codec_scales_latents_to_unit_variance_and_back() -> None:
    torch.manual_seed(0)
    model = Autoencoder(TINY_AE, 1)
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        measured = measure(model, images)
    codec = Codec(model, measured["latent_mean"], measured["latent_std"], "cpu")
    mean, _ = codec.encode(images)
    flat = mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(4), atol=1e-4, rtol=0)
    direct = to_uint8(model.decode(model.encode(images.float() / 127.5 - 1)[0]))
    assert (codec.decode(mean).int() - direct.int()).abs().max() <= 1
    mse = np.mean((direct.numpy().astype(float) - images.numpy()) ** 2)
    assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)


def test_image_sides_that_do_not_halve_are_refused() -> None:
    with pytest.raises(UserError, match="30x30 do not divide by 4"):
        AutoencoderTask(TINY_AE, (1, 30, 30), 0)


def test_only_what_is_named_is_trained_and_clipped() -> None:
    """Last layers and labels; the rest stays, and the clipped sum is theirs alone."""
    task = DiffusionTask(replace(SMALL, trainable=r"embedding.values|conv_out"), LATENTS, seed=0)
    model, whole = task.build(), TASKS["diffusion"].build()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[1] for name, _ in trained} == {"values", "conv_out"}
    assert all(torch.equal(p, dict(whole.named_parameters())[name]) for name, p in model.named_parameters())
    batch, expected = batch_of("diffusion"), torch.zeros(sum(p.numel() for _, p in trained))
    for i in range(4):
        loss = task.losses(model, {n: t[i : i + 1] for n, t in batch.items()}).sum()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for _, p in trained])])
        expected += flat * min(1.0, 0.3 / flat.norm().item())
    for chunk in (1, 4):
        found, _, _ = clipped_sum(model, task.losses, trained, batch, 1, 0.3, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"trainable='attention_of_nobody' is found in no parameter's name"):
        DiffusionTask(replace(SMALL, trainable="attention_of_nobody"), LATENTS, seed=0).build()


def test_adapters_alone_are_trained_and_clipped_and_merge_to_the_same_network() -> None:
    pytest.importorskip("peft")
    lora = LoraConfig(rank=2, alpha=6, layers=r"to_(q|k|v)$|conv1$|time_embedding")
    task = DiffusionTask(replace(SMALL, lora=lora, init="a run"), LATENTS, seed=0)
    model, plain, batch = task.network(), TASKS["diffusion"].build(), batch_of("diffusion")
    torch.testing.assert_close(task.losses(model, batch), task.losses(plain, batch))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name, _ in trained)
    for _, p in trained:
        p.data.normal_(std=0.2)
    found = clipped_sum(model, task.losses, trained, batch, 2, 0.3, 4, ClippingPath.bookkeeping)[0]
    expected = clipped_sum(model, task.losses, trained, batch, 2, 0.3, 1, ClippingPath.materialise)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    adapted = task.losses(model, batch)
    merge(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    torch.testing.assert_close(task.losses(model, batch), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - task.losses(plain, batch)).abs().min() > 1e-3
    assert memory.Model(task).parameters == sum(p.numel() for _, p in trained), "as it is planned"
    with pytest.raises(UserError, match=r"lora.layers='no_such' is found in the name of no Linear"):
        DiffusionTask(replace(SMALL, lora=LoraConfig(rank=2, layers="no_such"), init="a run"), LATENTS, 0).network()


@pytest.mark.parametrize(("density", "mixture"), [("uniform", []), ("mixture", [[0.2, 0.4, 1.0], [0.8, 1.0, 3.0]])])
def test_training_times_have_the_density_of_the_config(density: str, mixture: list[list[float]]) -> None:
    config = replace(SMALL, time_density=TimeDensity(density), time_mixture=mixture)
    times = DiffusionTask(config, LATENTS, seed=0)._times(rows(20_000))
    inside = [((times >= low) & (times < high)).float().mean().item() for low, high in ((0, 0.2), (0.2, 0.4), (0.8, 1))]
    assert inside == pytest.approx([0.2, 0.2, 0.2] if density == "uniform" else [0.0, 0.25, 0.75], abs=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"time_density": TimeDensity.mixture},
        {"time_mixture": [[0.0, 1.0, 1.0]]},
        {"time_density": TimeDensity.mixture, "time_mixture": [[0.5, 0.2, 1.0]]},
        {"trainable": "("},
        {"lora": LoraConfig(rank=2)},
        {"lora": LoraConfig(rank=2), "init": "a run", "trainable": "conv"},
    ],
)
def test_what_no_training_can_be_made_of(wrong: dict) -> None:
    assert len(replace(SMALL, **wrong).problems()) == 1 and SMALL.problems() == []
