"""The Triton kernels against what torch does in their place, eagerly and compiled, on a GPU.

The peers are what a model would run without them: torch's own operations in the dtype of the activations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj.errors import UserError

Row = dict[str, Any]
Run = Callable[[], Any]
BF16, FP32 = torch.bfloat16, torch.float32
ROUNDS = 3
TOKENS: list[tuple[int, ...]] = [
    (32, 256, 1152),
    (8, 1024, 1152),
    (64, 256, 384),
    (256, 64, 256),
    (2, 256, 1152),
]  # [B, T, D]
IMAGES = [
    (16, 320, 64, 64),
    (16, 640, 32, 32),
    (16, 1280, 16, 16),
    (2, 320, 64, 64),
    (256, 128, 16, 16),
    (4, 128, 256, 256),
]
LATENTS = [(8, 4, 64, 64), (256, 4, 32, 32), (64, 16, 128, 128)]
SHARDS = [2**20, 2**25, 2**28]


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("The kernels are measured on a GPU, and there is none; run this where there is one.")
    found = []
    for shape, dtype in (*product(TOKENS, (BF16,)), *product(TOKENS[:2], (FP32,))):
        found += _norms(shape, dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape, dtype in (*product(IMAGES, (BF16,)), *product(IMAGES[:2], (FP32,))):
            found += _groups(shape, dtype, layout)
    found += [row for dtype, shape in product((BF16, FP32), LATENTS) for row in _guided(shape, dtype)]
    found += [row for size, averages in product(SHARDS, (1, 3)) for row in _adamw(size, averages)]
    return found


def _norms(shape: tuple[int, ...], dtype: torch.dtype) -> list[Row]:
    from rayproj.kernels import norms_triton  # type: ignore[attr-defined]

    size = shape[-1]
    x, h = (_drawn(shape, dtype) for _ in range(2))
    gate, shift, scale = _drawn((shape[0], 3 * size), dtype).chunk(3, dim=1)

    def plain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (size,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def gated(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        r = x + gate[:, None] * h
        return r, plain(r, shift, scale)

    return [
        *_both("layer norm + modulate", norms_triton.layer_norm_modulate, plain, (x, shift, scale)),
        *_both(
            "gate + residual + layer norm + modulate", norms_triton.gated_norm_modulate, gated,
            (x, h, gate, shift, scale),
        ),
    ]  # fmt: skip


def _groups(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> list[Row]:
    from rayproj.kernels import norms_triton  # type: ignore[attr-defined]

    x = _drawn(shape, dtype).to(memory_format=layout)
    weight, bias = (_drawn((shape[1],), dtype) for _ in range(2))
    name = "group norm + SiLU" + (", channels-last" if layout is torch.channels_last else "")
    return _both(
        name,
        lambda x, w, b: norms_triton.group_norm_silu(x, 32, w, b, 1e-5),
        lambda x, w, b: F.silu(F.group_norm(x, 32, w, b, 1e-5)),
        (x, weight, bias),
    )


def _guided(shape: tuple[int, ...], dtype: torch.dtype) -> list[Row]:
    from rayproj.kernels import norms_triton  # type: ignore[attr-defined]

    x, (under, base) = _drawn(shape, FP32), (_drawn(shape, dtype) for _ in range(2))

    def plain(x: Tensor, under: Tensor, base: Tensor) -> Tensor:
        return 0.9 * x + 0.2 * (base + 4.0 * (under - base))

    with torch.no_grad():
        ours = lambda: norms_triton.guided_update(x, under, base, 4.0, 0.9, 0.2)  # noqa: E731
        return [_row("guidance + solver's update", "forward", under, ours, plain, (x, under, base))]


def _adamw(size: int, averages: int) -> list[Row]:
    from rayproj.kernels import adamw, adamw_triton  # type: ignore[attr-defined]

    gradient, master = (_drawn((size,), FP32) for _ in range(2))
    peer = master.clone().requires_grad_()
    peer.grad = gradient
    optimizer = torch.optim.AdamW([peer], lr=1e-4, betas=(0.9, 0.99), fused=True)
    exp_avg, exp_avg_sq = torch.zeros(2, size, device="cuda")
    kept = [master.clone() for _ in range(averages)]
    decays = [0.999] * averages

    def eager() -> None:
        optimizer.step()
        for average in kept:
            average.lerp_(peer.detach(), 0.001)

    def ours(function: Any = adamw_triton.update_with_averages) -> None:
        function(gradient, master, exp_avg, exp_avg_sq, kept, decays, 10, 1e-4, (0.9, 0.99), 1e-8, 0.01)

    compiled = torch.compile(adamw.update_with_averages)
    row = _timed({"ours": ours, "eager": eager, "compiled": lambda: ours(compiled)})
    said = {"metric": f"AdamW + {averages} averages", "mode": "update", "shape": [size], "dtype": "float32"}
    return [_told(said, row)]


def _both(name: str, ours: Any, plain: Any, inputs: tuple[Tensor, ...]) -> list[Row]:
    """Rows of the forward alone, and of forward and backward."""
    with torch.no_grad():
        found = [_row(name, "forward", inputs[0], lambda: ours(*inputs), plain, inputs)]
    leaves = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    found.append(_row(name, "training", inputs[0], _trained(ours, leaves), plain, leaves))
    return found


def _trained(function: Any, leaves: tuple[Tensor, ...]) -> Run:
    shown = function(*leaves)
    shown = shown if isinstance(shown, tuple) else (shown,)
    gradients = [torch.randn_like(t) for t in shown]

    def run() -> None:
        out = function(*leaves)
        torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, gradients)

    return run


def _row(name: str, mode: str, like: Tensor, ours: Run, plain: Any, inputs: tuple[Tensor, ...]) -> Row:
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=False)
    if mode == "training":
        ways = {"ours": ours, "eager": _trained(plain, inputs), "compiled": _trained(compiled, inputs)}
    else:
        ways = {"ours": ours, "eager": lambda: plain(*inputs), "compiled": lambda: compiled(*inputs)}
    said = {"metric": name, "mode": mode, "shape": list(like.shape), "dtype": str(like.dtype).removeprefix("torch.")}
    return _told(said, _timed(ways))


def _timed(ways: dict[str, Run]) -> dict[str, float]:
    """Median microseconds of each, in turns."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS):
        for way in list(ways) if number % 2 else reversed(list(ways)):
            times[way].append(1e3 * do_bench(ways[way], warmup=5, rep=20, return_mode="median"))
    return {way: statistics.median(taken) for way, taken in times.items()}


def _told(said: Row, micros: dict[str, float]) -> Row:
    peer = min(("eager", "compiled"), key=lambda way: micros[way])
    shown = f"{said['metric']}, {said['mode']}, {'x'.join(map(str, said['shape']))}, {said['dtype']}"
    return {
        **said, "kernel": said["metric"], "metric": shown, "unit": "us", "better": "lower", "goal": None,
        "ours": micros["ours"], "peer": f"torch, {peer}", "peer_value": micros[peer], "ratio": micros["ours"] / micros[peer],
        "eager": micros["eager"], "compiled": micros["compiled"],
    }  # fmt: skip


def _drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(math.prod(shape), device="cuda").reshape(shape).to(dtype)
