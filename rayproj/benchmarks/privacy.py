"""What clipping each example's gradient costs: time and memory of a step's clipped sum against those of an ordinary backward
over as many images, and against vmap and Opacus where it is installed.

Every measurement is a process of its own, and the ways take turns, so that a drift of the machine meets all of them.

python -m rayproj.benchmarks.privacy seconds|peak WAY MODEL EXAMPLES VIEWS    # one of them; prints a number
"""

from __future__ import annotations

import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from rayproj.engine.task import Batch
from rayproj.privacy.clipping import clip_factor, clipped_sum, with_views
from rayproj.privacy.plan import ClippingPath

Row = dict[str, Any]
STEPS, ROUNDS = 4, 3  # measured steps of a process, after one that is not; processes of a way
CLIP = 1.0
AT_ONCE = 32  # rows that ours holds at once
# (model, examples, views, ways, goal of time, goal of memory)
CASES: list[tuple[str, int, int, tuple[str, ...], float, float]] = [
    ("unet", 32, 1, ("plain", "two passes", "vmap", "opacus hooks", "opacus ghost"), 1.25, 1.1),
    ("unet", 32, 8, ("plain",), 1.10, 1.1),
    ("dit", 16, 1, ("plain", "two passes", "vmap", "opacus hooks", "opacus ghost"), 1.25, 1.1),
    ("dit", 8, 8, ("plain",), 1.10, 1.1),
]
NAMES = {"unet": "UNet2DModel (64, 128), 16x16", "dit": "DiT, 6 blocks of 256, 256 tokens"}


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    found = []
    for model, examples, views, ways, *goals in CASES:
        present = [way for way in ways if not way.startswith("opacus") or importlib.util.find_spec("opacus")]
        for way in set(ways) - set(present):
            print(f"{way}: not installed", file=sys.stderr)
        runs: dict[str, list[float]] = {way: [] for way in ("ours", *present)}
        peaks: dict[str, float] = {}
        what = f"clipped sum, {NAMES[model]}, {examples} examples, K={views}"
        for number in range(ROUNDS):
            for way in list(runs) if number % 2 else reversed(list(runs)):
                try:
                    runs[way].append(_run("seconds", way, model, examples, views))
                    peaks[way] = peaks.get(way) or _run("peak", way, model, examples, views)
                except RuntimeError as error:  # Opacus does not take every model
                    print(f"{what}: {way}: {error}", file=sys.stderr)
                    del runs[way]
        for way in [way for way in present if way in runs]:
            # Of each round, because the machine drifts between them.
            ratios = [a / b for a, b in zip(runs["ours"], runs[way], strict=True)]
            row = {"peer": "non-private backward" if way == "plain" else way, "better": "lower"}
            ours, other = (statistics.median(runs[w]) for w in ("ours", way))
            found.append(
                row
                | {"metric": f"{what}: time", "unit": "s", "ours": ours, "peer_value": other, "ratios": ratios}
                | {"ratio": statistics.median(ratios), "goal": goals[0] if way == "plain" else 1.0}
            )
            found.append(
                row
                | {"metric": f"{what}: memory", "unit": "MiB", "ours": peaks["ours"], "peer_value": peaks[way]}
                | {"ratio": peaks["ours"] / peaks[way], "goal": goals[1] if way == "plain" else 1.0}
            )
    return found


def _run(what: str, way: str, model: str, examples: int, views: int) -> float:
    """One measurement in a process of its own.

    Raises:
        RuntimeError: that process failed, with the last line that it wrote.
    """
    words = [sys.executable, "-m", "rayproj.benchmarks.privacy", what, way, model, str(examples), str(views)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if what == "peak":
        # What is freed goes back at once, so that the peak is what a way needs, and not what the heap's gaps make of it.
        env["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return float(done.stdout.strip().splitlines()[-1])


class Network(nn.Module):
    """A denoiser of diffusers, called by position as all ways of clipping can."""

    def __init__(self, kind: str, small: bool = False) -> None:
        super().__init__()
        if kind == "unet":
            from diffusers.models.unets.unet_2d import UNet2DModel

            self.net: Any = UNet2DModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                block_out_channels=(16, 16) if small else (64, 128),
                layers_per_block=2,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=16 if small else 32,
                norm_num_groups=16,
                num_class_embeds=10,
            )
        else:
            from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

            self.net = DiTTransformer2DModel(
                num_attention_heads=1 if small else 4,
                attention_head_dim=16 if small else 64,
                in_channels=4,
                out_channels=4,
                num_layers=1 if small else 6,
                sample_size=32,
                patch_size=2,
                num_embeds_ada_norm=10,
            )
        self.side = 16 if kind == "unet" else 32
        module: Any
        for module in self.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0  # of labels, by torch's generator

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, class_labels=label).sample
        return out


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Of the rows, [B]."""
    return (model(batch["x"], batch["t"], batch["label"]) - batch["noise"]).square().flatten(1).mean(1)


def batch_of(side: int, size: int) -> Batch:
    torch.manual_seed(0)
    row = torch.stack([torch.arange(size), torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)], 1)
    x, noise = torch.randn(2, size, 4, side, side)
    return {"row": row, "x": x, "noise": noise, "t": torch.arange(size) * 7 % 1000, "label": torch.arange(size) % 10}


def _plain(model: Network, views: int) -> Callable[[Batch], Any]:
    def step(batch: Batch) -> None:
        model.zero_grad()
        losses(model, with_views(batch, views)).mean().backward()

    return step


def _ours(model: Network, views: int, path: ClippingPath = ClippingPath.bookkeeping) -> Callable[[Batch], Any]:
    parameters = list(model.named_parameters())
    chunk = AT_ONCE // views
    return lambda batch: clipped_sum(model, losses, parameters, batch, views, CLIP, chunk, path)


def _opacus(model: Network, ghost: bool) -> Callable[[Batch], Any]:
    """Opacus up to the clipped sum, for one view."""
    if ghost:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP, use_ghost_clipping=True)
    else:
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(model)

    def hooks(batch: Batch) -> None:
        wrapped.zero_grad()
        losses(wrapped, batch).mean().backward()
        samples = [p.grad_sample for p in wrapped.parameters() if p.grad_sample is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples], 1).norm(dim=1)
        factors = clip_factor(norms, CLIP)
        for g in samples:
            torch.einsum("i,i...", factors, g)

    def ghost_step(batch: Batch) -> None:
        found = losses(wrapped, batch)
        found.mean().backward(retain_graph=True)
        factors = wrapped.get_clipping_coef()
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (factors * found).sum().backward()
        wrapped.enable_hooks()

    return ghost_step if ghost else hooks


def _step(way: str, model: Network, views: int) -> Callable[[Batch], Any]:
    if way == "plain":
        return _plain(model, views)
    if way.startswith("opacus"):
        return _opacus(model, way.endswith("ghost"))
    return _ours(
        model,
        views,
        {"vmap": ClippingPath.materialise, "two passes": ClippingPath.two_pass}.get(way, ClippingPath.bookkeeping),
    )


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", File("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def one(what: str, way: str, kind: str, examples: int, views: int) -> float:
    """In this process: the median seconds of a step, or the peak of memory in MiB above that of a tiny one."""
    torch.set_num_threads(1)
    tiny = Network(kind, small=True)
    _step(way, tiny, views)(batch_of(tiny.side, 2))  # what is loaded lazily is loaded
    start = resident("VmRSS")
    model = Network(kind)
    step, batch = _step(way, model, views), batch_of(model.side, examples)
    step(batch)
    if what == "peak":
        return resident("VmHWM") - start
    seconds = []
    for _ in range(STEPS if views == 1 else 2):
        began = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    print(one(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
