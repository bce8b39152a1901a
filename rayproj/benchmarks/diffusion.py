"""Training steps and sampling against diffusers: its own building blocks in accelerate's loop, and its own pipeline.

Each measurement is a process of its own, and ours and the peer's take turns. The network, the batch and the arithmetic are
the same on both sides: AdamW, an average of the weights, rectified flow; a Stable Diffusion pipeline with guidance and
DPM-Solver++.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayproj.benchmarks.privacy import resident
from rayproj.data.dataset import Field, Header
from rayproj.diffusion import sampling
from rayproj.diffusion.conditions import ConditionConfig, Conditions
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, Network
from rayproj.diffusion.process import Path as ProcessPath
from rayproj.diffusion.process import Prediction, Process, ProcessConfig
from rayproj.diffusion.sampling import SamplerConfig, Solver
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask, made_ready, remembered
from rayproj.engine.compiling import compile_blocks
from rayproj.engine.engine import Engine, EngineConfig, OptimizerConfig
from rayproj.engine.flops import flops_per_sample
from rayproj.engine.steps import PlainStep
from rayproj.engine.world import World

Row = dict[str, Any]
STEPS, ROUNDS, THREADS = 12, 3, 2
SAMPLER_STEPS = 20
GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
DIT, XL = (DenoiserConfig(Network.dit, layers=n, heads=h, head_dim=d) for n, h, d in ((6, 4, 64), (28, 16, 72)))


@dataclass(frozen=True)
class Trained:
    """What is trained: a network on latents of a side, so many at once."""

    denoiser: DenoiserConfig
    side: int
    batch: int


@dataclass(frozen=True)
class Drawn:
    """What is drawn: so many images by a Stable Diffusion pipeline with these levels, on latents of a side."""

    channels: tuple[int, ...]
    decoder: tuple[int, ...]
    side: int
    images: int
    heads: tuple[int, ...]
    tokens: int
    depth: int


CPU_NETWORKS = {
    "UNet (64, 128), 4x16x16": Trained(DenoiserConfig(channels=(64, 128)), 16, 32),
    "DiT, 6 blocks of 256, 64 tokens": Trained(DIT, 16, 32),
}
GPU_NETWORKS = {
    "UNet (128, 256, 512), 4x32x32": Trained(
        DenoiserConfig(channels=(128, 256, 512), layers_per_block=2, head_dim=64, norm_groups=32), 32, 128
    ),
    "DiT-XL/2, 4x32x32": Trained(XL, 32, 64),
}
NETWORKS = GPU_NETWORKS if GPU else CPU_NETWORKS
SMALL = Drawn((64, 128), (16, 32, 32), 16, 8, (2, 4), 32, 64)
PIPELINES = {"Stable Diffusion in small": SMALL}
if GPU:
    full = Drawn((320, 640, 1280, 1280), (128, 256, 512, 512), 64, 4, (8, 8, 8, 8), 77, 768)
    PIPELINES |= {"Stable Diffusion 1.5's size": full}
SWITCHES: dict[str, dict[str, Any]] = {  # of a training step
    "compiled blocks": {"compiled": True},
    "channels-last": {"channels_last": True},
    "recomputed activations": {"recompute": True},
}


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    found = []
    for name in NETWORKS:
        ways = ["ours", "peer", *SWITCHES] + (["peer compiled"] if GPU else [])
        measured = _measured("train", name, ways)
        what = f"training step, {name}"
        found += _rows(what, measured, "ours", "peer", "accelerate and diffusers", 1.0)
        for switch in SWITCHES:
            found += _rows(f"{what}, {switch}", measured, switch, "ours", "ours without", None)
        if GPU:
            found += _rows(f"{what}, both compiled", measured, "compiled blocks", "peer compiled", "the same", 1.0)
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as folder:
        for name, size in PIPELINES.items():
            place = Path(folder, name)
            _write_pipeline(place, size)
            measured = _measured("sample", name, ["ours", "peer", "ours compiled", "peer compiled"], str(place))
            what, peer = f"{size.images} samples of {SAMPLER_STEPS} steps, {name}", "StableDiffusionPipeline"
            found += _rows(what, measured, "ours", "peer", peer, 0.5 if GPU else 1.0)
            found += _rows(f"{what}, ours compiled", measured, "ours compiled", "peer", peer, 0.5 if GPU else 1 / 1.2)
            found += _rows(f"{what}, both compiled", measured, "ours compiled", "peer compiled", peer, 1.0)
    for name in NETWORKS:
        peak, reached = (float(_run("mfu", what, name)) for what in ("peak", "ours"))
        rate = {"metric": f"arithmetic of a training step, {name}", "unit": "TFLOPS", "better": "higher", "goal": None}
        found.append(rate | {"ours": reached, "peer": "torch.mm", "peer_value": peak, "ratio": reached / peak})
    return found


def _measured(what: str, which: str, ways: list[str], *more: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds and MiB of each way, in turns."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(1 if GPU else ROUNDS):
        for way in ways if number % 2 else reversed(ways):
            seconds, peak = map(float, _run(what, way, which, *more).split())
            found[way].append((seconds, peak))
    return found


def _rows(
    metric: str, measured: dict[str, list[tuple[float, float]]], ours: str, peer: str, named: str, goal: float | None
) -> list[Row]:
    """The time, as the median of the rounds' ratios, and the memory."""
    ratios = [a / b for (a, _), (b, _) in zip(measured[ours], measured[peer], strict=True)]
    (seconds, peak), (other, others_peak) = (
        [statistics.median(v) for v in zip(*measured[way], strict=True)] for way in (ours, peer)
    )
    row = {"peer": named, "better": "lower"}
    return [
        row | {"metric": metric, "unit": "s", "ours": seconds, "peer_value": other, "ratios": ratios}
        | {"ratio": statistics.median(ratios), "goal": goal},
        row | {"metric": f"{metric}: memory", "unit": "MiB", "ours": peak, "peer_value": others_peak}
        | {"ratio": peak / others_peak, "goal": None},
    ]  # fmt: skip


def _run(*words: str) -> str:
    """One measurement in a process of its own: the last line that it writes.

    Raises:
        RuntimeError: it failed, with the end of what it wrote.
    """
    command = [sys.executable, "-m", "rayproj.benchmarks.diffusion", *words]
    env = {**os.environ} if GPU else {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.strip().splitlines()[-1]


def _task(name: str, **switches: Any) -> DiffusionTask:
    side = NETWORKS[name].side
    fields = {"moments": Field("npy", (8, side, side)), "label": Field("int")}
    header = Header("benchmark", fields, 2048, 256, tuple("0123456789"))
    conditions = {"label": ConditionConfig()}
    denoiser = replace(NETWORKS[name].denoiser, **switches)
    return DiffusionTask(DiffusionConfig("", denoiser=denoiser, conditions=conditions), header, seed=0)


def _batch(name: str, step: int) -> dict[str, Tensor]:
    generator, batch, side = torch.Generator().manual_seed(step), NETWORKS[name].batch, NETWORKS[name].side
    row = torch.stack([torch.arange(batch), torch.full((batch,), step), torch.zeros(batch, dtype=torch.long)], 1)
    moments = torch.randn(batch, 8, side, side, generator=generator)
    found = {"row": row, "moments": moments, "label": torch.arange(batch) % 10}
    return {key: value.to(DEVICE) for key, value in found.items()}


def _ours_trained(name: str, compiled: bool = False, **switches: Any) -> Callable[[int], Any]:
    task = _task(name, **switches)
    engine, step = _engine(task, compiled), PlainStep(NETWORKS[name].batch, 0, 1)
    return lambda number: step(engine, task, _batch(name, number))


def _engine(task: DiffusionTask, compiled: bool = False) -> Engine:
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = EngineConfig(optimizer=OptimizerConfig(lr=1e-4, clip_grad_norm=1.0), compile=compiled)
    return Engine(task.build(), config, 1000, World(0, 1, 0, DEVICE))


def _theirs_trained(name: str, compiled: bool = False) -> Callable[[int], Any]:
    """As the training scripts of diffusers go."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=not GPU, mixed_precision="bf16" if GPU else "no")
    model = _task(name).build().to(DEVICE)
    average = EMAModel(model.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    model, optimizer = accelerator.prepare(model, optimizer)
    if compiled:
        compile_blocks(model)

    def step(number: int) -> float:
        batch = _batch(name, number)
        mean, std = batch["moments"].chunk(2, dim=1)
        x0, noise = mean + std * torch.randn_like(mean), torch.randn_like(mean)
        t = torch.sigmoid(torch.randn(len(x0), device=DEVICE))
        label = torch.where(torch.rand(len(x0), device=DEVICE) < 0.1, -1, batch["label"])
        x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        loss = (model(x, t, {"label": label}) - (noise - x0)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        return loss.item()

    return step


def _write_pipeline(folder: Path, size: Drawn) -> None:
    """A Stable Diffusion pipeline with random weights, but for its text encoder: both sides are given embeddings."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_device(DEVICE)  # where so many weights are drawn faster
    levels, groups = len(size.channels), math.gcd(32, size.channels[0] // 2)
    kinds = ["CrossAttn"] * (levels - 1) + ["CrossAttn" if levels == 2 else ""]  # as Stable Diffusion has them
    UNet2DConditionModel(
        sample_size=size.side, in_channels=4, out_channels=4, block_out_channels=size.channels,
        layers_per_block=1 if levels == 2 else 2,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        cross_attention_dim=size.depth, attention_head_dim=size.heads, norm_num_groups=groups,
    ).to(DTYPE).save_pretrained(folder / "unet")  # fmt: skip
    levels, groups = len(size.decoder), math.gcd(32, size.decoder[0] // 2)
    AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=size.decoder, norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1 if levels == 3 else 2,
    ).to(DTYPE).save_pretrained(folder / "vae")  # fmt: skip
    torch.set_default_device("cpu")


def _given(size: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Texts' embeddings, those of no text, and the noise."""
    generator = torch.Generator().manual_seed(0)
    text, nothing = torch.randn(2, size.images, size.tokens, size.depth, generator=generator).to(DEVICE)
    noise = torch.randn(size.images, 4, size.side, size.side, generator=generator)
    return text, nothing[:1], noise.to(DEVICE)


def _ours_sampled(which: str, folder: str, compiled: bool = False) -> Callable[[int], Any]:
    from rayproj.diffusion.autoencoder import Autoencoder, AutoencoderConfig, Codec

    size = PIPELINES[which]
    text, nothing, noise = _given(size)
    conditions = Conditions({}, (size.tokens, size.depth))
    model = Denoiser(DenoiserConfig(weights=f"{folder}/unet"), (4, size.side, size.side), conditions).eval()
    model.embedding.no_text.weight.data.copy_(nothing.reshape(1, -1))
    model.requires_grad_(False).to(DEVICE, DTYPE)
    autoencoder = Autoencoder(AutoencoderConfig(weights=f"{folder}/vae"), 3).to(DTYPE)
    codec = Codec(autoencoder, [0.0] * 4, [1.0] * 4, DEVICE)
    config = SamplerConfig(SAMPLER_STEPS, Solver.dpmpp_2m, guidance=5.0, compile=compiled)
    process = Process(ProcessConfig(ProcessPath.scaled_linear, Prediction.noise))
    network = made_ready(model, codec, config, DEVICE)

    def draw(number: int) -> Tensor:
        with remembered(network):
            guided = sampling.guided(network, config)
            latents = sampling.integrate(guided, noise, {"text": text}, config, process, unguided=network)
            return codec.decode(latents).cpu()

    return draw


def _theirs_sampled(which: str, folder: str, compiled: bool = False) -> Callable[[int], Any]:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

    text, nothing, noise = _given(PIPELINES[which])
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(f"{folder}/vae"), None, None, UNet2DConditionModel.from_pretrained(f"{folder}/unet"),
        scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(DEVICE, DTYPE)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet.compile()
    kept: dict[str, Any] = {"num_inference_steps": SAMPLER_STEPS, "guidance_scale": 5.0, "output_type": "np"}
    kept |= {"prompt_embeds": text.to(DTYPE), "negative_prompt_embeds": nothing.expand_as(text).to(DTYPE)}
    return lambda number: pipeline(latents=noise.to(DTYPE, copy=True), **kept).images


WAYS: dict[tuple[str, str], Callable[..., Callable[[int], Any]]] = {
    ("train", "ours"): _ours_trained,
    **{("train", name): partial(_ours_trained, **switch) for name, switch in SWITCHES.items()},
    ("train", "peer"): _theirs_trained,
    ("train", "peer compiled"): partial(_theirs_trained, compiled=True),
    ("sample", "ours"): _ours_sampled,
    ("sample", "ours compiled"): partial(_ours_sampled, compiled=True),
    ("sample", "peer"): _theirs_sampled,
    ("sample", "peer compiled"): partial(_theirs_sampled, compiled=True),
}


def one(what: str, way: str, which: str, *more: str) -> str:
    """In this process: the median seconds of a step and the peak of memory in MiB above the start; of "mfu", TFLOPS."""
    if not GPU:
        torch.set_num_threads(THREADS)
    if what == "mfu" and way == "peak":
        side = 8192 if GPU else 2048
        a, b = torch.randn(2, side, side, device=DEVICE).to(DTYPE)
        return str(2 * side**3 / 1e12 / _median(lambda number: torch.mm(a, b), STEPS))
    if what == "mfu":
        task = _task(which)
        engine, step = _engine(task), PlainStep(NETWORKS[which].batch, 0, 1)
        work = NETWORKS[which].batch * flops_per_sample(engine, task, _batch(which, 0))
        return str(work / 1e12 / _median(lambda number: step(engine, task, _batch(which, number)), STEPS))
    start = resident("VmRSS")
    run = WAYS[what, way](which, *more)
    seconds = _median(run, STEPS if which in NETWORKS else 3)
    return f"{seconds} {torch.cuda.max_memory_allocated() / 2**20 if GPU else resident('VmHWM') - start}"


def _median(run: Callable[[int], Any], times: int) -> float:
    """Seconds of a run, after three that are not counted."""
    taken = []
    for number in range(times + 3):
        began = time.perf_counter()
        run(number)
        if GPU:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:])


if __name__ == "__main__":
    print(one(*sys.argv[1:]))
