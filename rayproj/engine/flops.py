"""Floating-point operations of a training step, and what a device could do."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from rayproj.engine.engine import Engine
from rayproj.engine.task import Batch, Task

# Dense bf16 peak in TFLOP/s by NVIDIA's data sheets; a name in torch's device name.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125, "B200": 2250, "A10G": 70}


def peak_tflops(device: str) -> float:
    """Of one device; 0 where it is not known."""
    if not device.startswith("cuda"):
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for key, peak in PEAK_TFLOPS.items() if key in name), 0.0)


@torch.no_grad()
def flops_per_sample(engine: Engine, task: Task, batch: Batch) -> float:
    """Of one example's forward and backward: three times its forward's matrix products and convolutions.

    The backward counts as two forwards (Chowdhery et al. 2022, "PaLM", appendix B); work done again by activation
    checkpointing is not counted, so that a ratio to the peak is a model's FLOPs utilisation. Collective at ZeRO-3; leaves
    the generators, the buffers and the gradients as they were.
    """
    one = {name: tensor[:1] for name, tensor in batch.items()}
    modes = {module: module.training for module in engine.module.modules()}
    engine.module.eval()  # running statistics stay as they are
    counter = FlopCounterMode(display=False)
    try:
        # Of a compiled block the counter sees nothing.
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), counter:
            task.losses(engine.deepspeed, one)
    finally:
        for module, training in modes.items():
            module.training = training
    return 3.0 * counter.get_total_flops()
