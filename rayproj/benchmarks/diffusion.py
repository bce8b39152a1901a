"""Training steps and sampling against diffusers: its own building blocks in accelerate's loop, and its own pipeline.

Each measurement is a process of its own, and ours and the peer's take turns. The network, the batch and the arithmetic are
the same on both sides: AdamW, an average of the weights, rectified flow; a Stable Diffusion pipeline with guidance and
DPM-Solver++.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, Network, remembering
from rayproj.diffusion.process import Path as ProcessPath
from rayproj.diffusion.process import Prediction, Process, ProcessConfig
from rayproj.diffusion.sampling import SamplerConfig, Solver
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.engine import Engine, EngineConfig, OptimizerConfig
from rayproj.engine.flops import flops_per_sample
from rayproj.engine.steps import PlainStep
from rayproj.engine.world import World

Row = dict[str, Any]
STEPS, ROUNDS, BATCH, THREADS = 12, 3, 32, 2
TOKENS, DEPTH, SAMPLER_STEPS, IMAGES = 32, 64, 20, 8
SWITCHES = ("compiled blocks", "channels-last", "recomputed activations")  # of a training step
NETWORKS = {
    "UNet (64, 128), 4x16x16": DenoiserConfig(channels=(64, 128)),
    "DiT, 6 blocks of 256, 64 tokens": DenoiserConfig(Network.dit, layers=6, heads=4, head_dim=64),
}


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    found = [row for name in NETWORKS for row in _compare("train", name, "training step", "s", "lower", 1.0)]
    for what in SWITCHES:
        found += [
            row for name in NETWORKS for row in _compare(what, name, f"training step, {what}", "s", "lower", None)
        ]
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as folder:
        _write_pipeline(Path(folder))
        what = f"{IMAGES} samples of {SAMPLER_STEPS} steps"
        found += _compare("sample", folder, what, "s", "lower", 1.0)
        found += _compare("compiled", folder, f"{what}, ours compiled", "s", "lower", 1 / 1.2)
        found += _compare("both compiled", folder, f"{what}, both compiled", "s", "lower", 1.0)
    peak, reached = (float(_run("mfu", what, "")) for what in ("peak", "ours"))
    rate = {"metric": "arithmetic of a training step, UNet", "unit": "TFLOPS", "better": "higher", "goal": None}
    found.append(rate | {"ours": reached, "peer": "torch.mm", "peer_value": peak, "ratio": reached / peak})
    return found


def _compare(what: str, which: str, metric: str, unit: str, better: str, goal: float | None) -> list[Row]:
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    peaks: dict[str, float] = {}
    for number in range(1 if "compiled" in what else ROUNDS):  # their start is long
        for way in list(times) if number % 2 else reversed(list(times)):
            seconds, peak = map(float, _run(what, way, which).split())
            times[way].append(seconds)
            peaks[way] = peak
    shown = f"{metric}, {which}" if which in NETWORKS else f"{metric}, Stable Diffusion in small"
    peer = "accelerate and diffusers" if what == "train" else "StableDiffusionPipeline"
    peer = "ours without" if what in SWITCHES else peer
    ratios = [a / b for a, b in zip(times["ours"], times["peer"], strict=True)]
    ours, other = (statistics.median(times[way]) for way in ("ours", "peer"))
    row = {"peer": peer, "better": better}
    return [
        row | {"metric": shown, "unit": unit, "ours": ours, "peer_value": other, "ratios": ratios}
        | {"ratio": statistics.median(ratios), "goal": goal},
        row | {"metric": f"{shown}: memory", "unit": "MiB", "ours": peaks["ours"], "peer_value": peaks["peer"]}
        | {"ratio": peaks["ours"] / peaks["peer"], "goal": None},
    ]  # fmt: skip


def _run(*words: str) -> str:
    """One measurement in a process of its own: the last line that it writes.

    Raises:
        RuntimeError: it failed, with the end of what it wrote.
    """
    command = [sys.executable, "-m", "rayproj.benchmarks.diffusion", *words]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.strip().splitlines()[-1]


def _task(name: str, **switches: Any) -> DiffusionTask:
    fields = {"moments": Field("npy", (8, 16, 16)), "label": Field("int")}
    header = Header("benchmark", fields, 2048, 256, tuple("0123456789"))
    conditions = {"label": ConditionConfig()}
    denoiser = replace(NETWORKS[name], **switches)
    return DiffusionTask(DiffusionConfig("", denoiser=denoiser, conditions=conditions), header, seed=0)


def _batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    row = torch.stack([torch.arange(BATCH), torch.full((BATCH,), step), torch.zeros(BATCH, dtype=torch.long)], 1)
    moments = torch.randn(BATCH, 8, 16, 16, generator=generator)
    return {"row": row, "moments": moments, "label": torch.arange(BATCH) % 10}


def _ours_trained(name: str, compiled: bool = False, **switches: Any) -> Callable[[int], Any]:
    task = _task(name, **switches)
    engine, step = _engine(task, compiled), PlainStep(BATCH, 0, 1)
    return lambda number: step(engine, task, _batch(number))


def _engine(task: DiffusionTask, compiled: bool = False) -> Engine:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = EngineConfig(optimizer=OptimizerConfig(lr=1e-4, clip_grad_norm=1.0), compile=compiled)
    return Engine(task.build(), config, 1000, World(0, 1, 0, "cpu"))


def _theirs_trained(name: str) -> Callable[[int], Any]:
    """As the training scripts of diffusers go."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    model = _task(name).build()
    average = EMAModel(model.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    model, optimizer = accelerator.prepare(model, optimizer)

    def step(number: int) -> float:
        batch = _batch(number)
        mean, std = batch["moments"].chunk(2, dim=1)
        x0, noise = mean + std * torch.randn_like(mean), torch.randn_like(mean)
        t = torch.sigmoid(torch.randn(BATCH))
        label = torch.where(torch.rand(BATCH) < 0.1, -1, batch["label"])
        x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        loss = (model(x, t, {"label": label}) - (noise - x0)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        return loss.item()

    return step


def _write_pipeline(folder: Path) -> None:
    """A Stable Diffusion pipeline with random weights, but for its text encoder: both sides are given embeddings."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=DEPTH, attention_head_dim=(2, 4), norm_num_groups=16,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
    ).save_pretrained(folder / "vae")  # fmt: skip


def _given() -> tuple[Tensor, Tensor, Tensor]:
    """Texts' embeddings, those of no text, and the noise."""
    generator = torch.Generator().manual_seed(0)
    text, nothing = torch.randn(2, IMAGES, TOKENS, DEPTH, generator=generator)
    return text, nothing[:1], torch.randn(IMAGES, 4, 16, 16, generator=generator)


def _ours_sampled(folder: str, compiled: bool = False) -> Callable[[int], Any]:
    from rayproj.diffusion.autoencoder import Autoencoder, AutoencoderConfig, Codec

    text, nothing, noise = _given()
    model = Denoiser(DenoiserConfig(weights=f"{folder}/unet"), (4, 16, 16), Conditions({}, (TOKENS, DEPTH))).eval()
    model.embedding.no_text.weight.data.copy_(nothing.reshape(1, -1))
    model.requires_grad_(False)
    codec = Codec(Autoencoder(AutoencoderConfig(weights=f"{folder}/vae"), 3), [0.0] * 4, [1.0] * 4, "cpu")
    if compiled:
        model.net.compile()
    config = SamplerConfig(SAMPLER_STEPS, Solver.dpmpp_2m, guidance=5.0)
    process = Process(ProcessConfig(ProcessPath.scaled_linear, Prediction.noise))

    def draw(number: int) -> Tensor:
        with remembering(model):
            network = sampling.guided(model, config)
            return codec.decode(sampling.integrate(network, noise, {"text": text}, config, process, unguided=model))

    return draw


def _theirs_sampled(folder: str, compiled: bool = False) -> Callable[[int], Any]:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

    text, nothing, noise = _given()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(f"{folder}/vae"), None, None, UNet2DConditionModel.from_pretrained(f"{folder}/unet"),
        scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet.compile()
    kept: dict[str, Any] = {"num_inference_steps": SAMPLER_STEPS, "guidance_scale": 5.0, "output_type": "np"}
    kept |= {"prompt_embeds": text, "negative_prompt_embeds": nothing.expand_as(text)}
    return lambda number: pipeline(latents=noise.clone(), **kept).images


WAYS: dict[tuple[str, str], Callable[[str], Callable[[int], Any]]] = {
    ("train", "ours"): _ours_trained,
    ("train", "peer"): _theirs_trained,
    ("compiled blocks", "ours"): partial(_ours_trained, compiled=True),
    ("channels-last", "ours"): partial(_ours_trained, channels_last=True),
    ("recomputed activations", "ours"): partial(_ours_trained, recompute=True),
    **{(what, "peer"): _ours_trained for what in SWITCHES},
    ("sample", "ours"): _ours_sampled,
    ("sample", "peer"): _theirs_sampled,
    ("compiled", "ours"): partial(_ours_sampled, compiled=True),
    ("compiled", "peer"): _theirs_sampled,
    ("both compiled", "ours"): partial(_ours_sampled, compiled=True),
    ("both compiled", "peer"): partial(_theirs_sampled, compiled=True),
}


def one(what: str, way: str, which: str) -> str:
    """In this process: the median seconds of a step and the peak of memory in MiB above the start; of "mfu", TFLOPS."""
    torch.set_num_threads(THREADS)
    if what == "mfu" and way == "peak":
        a, b = torch.randn(2, 2048, 2048)
        return str(2 * 2048**3 / 1e12 / _median(lambda number: torch.mm(a, b), STEPS))
    if what == "mfu":
        name = next(iter(NETWORKS))
        task = _task(name)
        engine, step = _engine(task), PlainStep(BATCH, 0, 1)
        work = BATCH * flops_per_sample(engine, task, _batch(0))
        return str(work / 1e12 / _median(lambda number: step(engine, task, _batch(number)), STEPS))
    start = resident("VmRSS")
    run = WAYS[what, way](which)
    seconds = _median(run, STEPS if which in NETWORKS else 3)
    return f"{seconds} {resident('VmHWM') - start}"


def _median(run: Callable[[int], Any], times: int) -> float:
    """Seconds of a run, after two that are not counted."""
    taken = []
    for number in range(times + 2):
        began = time.perf_counter()
        run(number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


if __name__ == "__main__":
    print(one(*sys.argv[1:4]))
