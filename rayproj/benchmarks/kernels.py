"""The Triton kernels against what torch does in their place, eagerly and compiled, on a GPU.

The peers are what a model would run without them: torch's own operations in the dtype of the activations. Forwards are timed
as in a CUDA graph, in which samplers run them; forward and backward launched from Python, as a training step does.
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
ROUNDS = 2
TOKENS: list[tuple[int, ...]] = [(32, 256, 1152), (8, 1024, 1152), (64, 256, 384)]  # [B, T, D]
IMAGES: list[tuple[int, ...]] = [(16, 320, 64, 64), (16, 640, 32, 32), (16, 1280, 16, 16), (2, 320, 64, 64)]
LATENTS = [(8, 4, 64, 64), (64, 16, 128, 128)]
SHARDS = [2**20, 2**25, 2**28]
ATTACKED: list[tuple[int, ...]] = [(128, 1, 28, 28), (512, 3, 32, 32), (64, 3, 224, 224)]
LAYOUTS = {"": torch.contiguous_format, ", channels-last": torch.channels_last}


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("The kernels are measured on a GPU, and there is none; run this where there is one.")
    found = []
    for shape, dtype in (*product(TOKENS, (BF16,)), (TOKENS[0], FP32)):
        found += _norms(shape, dtype, trained=(shape, dtype) == (TOKENS[1], BF16))
    for layout in LAYOUTS:
        for shape, dtype in (*product(IMAGES, (BF16,)), (IMAGES[0], FP32)):
            found += _groups(shape, dtype, layout, trained=(shape, dtype) == (IMAGES[0], BF16))
    found += [row for shape in LATENTS for row in _guided(shape, BF16)]
    found += [row for size in SHARDS for row in _adamw(size, 1)]
    found += [_ascent(shape, euclidean) for euclidean in (False, True) for shape in ATTACKED]
    return found


def _norms(shape: tuple[int, ...], dtype: torch.dtype, trained: bool) -> list[Row]:
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
        *_both("layer norm + modulate", norms_triton.layer_norm_modulate, plain, (x, shift, scale), False),
        *_both(
            "gate + residual + layer norm + modulate", norms_triton.gated_norm_modulate, gated,
            (x, h, gate, shift, scale), trained,
        ),
    ]  # fmt: skip


def _groups(shape: tuple[int, ...], dtype: torch.dtype, layout: str, trained: bool) -> list[Row]:
    from rayproj.kernels import norms_triton  # type: ignore[attr-defined]

    x = _drawn(shape, dtype).to(memory_format=LAYOUTS[layout])
    weight, bias = (_drawn((shape[1],), dtype) for _ in range(2))
    return _both(
        f"group norm + SiLU{layout}",
        lambda x, w, b: norms_triton.group_norm_silu(x, 32, w, b, 1e-5),
        lambda x, w, b: F.silu(F.group_norm(x, 32, w, b, 1e-5)),
        (x, weight, bias),
        trained,
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
    row = _timed({"ours": ours, "eager": eager, "compiled": lambda: ours(compiled)}, launched=True)
    said = {"metric": f"AdamW + {averages} averages", "mode": "update", "shape": [size], "dtype": "float32"}
    return [_told(said, row)]


def _ascent(shape: tuple[int, ...], euclidean: bool) -> Row:
    """A step of APGD with momentum, launched from Python, as attacks do it."""
    from rayproj.kernels import ascent, ascent_triton  # type: ignore[attr-defined]

    x, move = torch.rand(shape, device="cuda"), _drawn((2, *shape), FP32)
    eps = 1.0 if euclidean else 8 / 255
    point, before = (ascent.projected(x, x + delta, eps, euclidean) for delta in move)
    told = (x, point, before, _drawn(shape, FP32), torch.full(shape[:1], eps, device="cuda"), eps, 0.75, euclidean)
    torch.testing.assert_close(ascent_triton.move(*told), ascent.move(*told), rtol=0, atol=1e-5)
    torch._dynamo.reset()
    ways = {"ours": ascent_triton.move, "eager": ascent.move, "compiled": torch.compile(ascent.move, dynamic=False)}
    said = {"metric": f"APGD step, {'l2' if euclidean else 'linf'}", "mode": "launched", "shape": list(shape)}
    row = _timed({way: lambda run=run: run(*told) for way, run in ways.items()}, launched=True)  # type: ignore[misc]
    return _told({**said, "dtype": "float32"}, row)


def _both(name: str, ours: Any, plain: Any, inputs: tuple[Tensor, ...], trained: bool) -> list[Row]:
    """Rows of the forward alone, and of forward and backward if asked for."""
    with torch.no_grad():
        found = [_row(name, "forward", inputs[0], lambda: ours(*inputs), plain, inputs)]
    if not trained:
        return found
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
    return _told(said, _timed(ways, launched=mode == "training"))


def _timed(ways: dict[str, Run], launched: bool = False) -> dict[str, float]:
    """Median microseconds of each, in turns: the device's own, as in a CUDA graph; or launched one by one from Python."""
    from triton.testing import do_bench, do_bench_cudagraph

    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS):
        for way in list(ways) if number % 2 else reversed(list(ways)):
            if launched:
                taken = do_bench(ways[way], warmup=5, rep=20, return_mode="median")
            else:
                ways[way]()
                with torch.cuda.stream(torch.cuda.Stream()):
                    taken = do_bench_cudagraph(ways[way], rep=10, return_mode="median")
            times[way].append(1e3 * taken)
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
