"""Which kernels are used, and for what: by `benchmarks/kernels.json`, which `jobs/benchmark.py kernels` writes on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SPREAD = 1.01  # what repeated measurements differ by
MEASURED_ON = (9, 0)  # compute capability
CHANNELS_LAST = ", channels-last"

Least = dict[tuple[str, str], int]
"""By kernel and dtype: elements of the activations from which on it is used."""

# Of forwards, as samplers run them. Launched from Python, forward and backward gained nothing: training uses none.
ADMITTED: Least = {
    ("layer norm + modulate", "bfloat16"): 32 * 256 * 1152,
    ("layer norm + modulate", "float32"): 32 * 256 * 1152,
    ("gate + residual + layer norm + modulate", "bfloat16"): 32 * 256 * 1152,
    ("gate + residual + layer norm + modulate", "float32"): 32 * 256 * 1152,
    ("group norm + SiLU", "bfloat16"): 2 * 320 * 64 * 64,
    ("group norm + SiLU", "float32"): 16 * 320 * 64 * 64,
    ("group norm + SiLU, channels-last", "bfloat16"): 16 * 640 * 32 * 32,
}


def admits(kernel: str, x: Tensor) -> bool:
    """Whether to use a kernel on these activations: on such a GPU as it was measured on, in a forward that nothing is
    learned from. Inside of `torch.compile`, which makes such kernels itself, none is used."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.cuda.get_device_capability(x.device) != MEASURED_ON:
        return False
    if x.ndim == 4 and not x.is_contiguous():
        kernel += CHANNELS_LAST
    least = ADMITTED.get((kernel, str(x.dtype).removeprefix("torch.")))
    return least is not None and x.numel() >= least


def admitted(rows: Iterable[Mapping[str, Any]]) -> Least:
    """What measurements admit: a kernel from the smallest size on from which it was never slower than torch, neither eager
    nor compiled, by more than the spread."""
    sizes: dict[tuple[str, str], list[tuple[int, bool]]] = {}
    for row in rows:
        if row["mode"] == "forward":
            fast = row["ours"] <= SPREAD * min(row["eager"], row["compiled"])
            sizes.setdefault((row["kernel"], row["dtype"]), []).append((math.prod(row["shape"]), fast))
    found: Least = {}
    for key, measured in sizes.items():
        for size in sorted({size for size, _ in measured}, reverse=True):
            if not all(fast for other, fast in measured if other == size):
                break
            found[key] = size
    return found
