"""The peer: the same model in a bare DeepSpeed loop, as any DeepSpeed script has it; run by torchrun.

torchrun --standalone --nproc-per-node N -m rayproj.benchmarks.bare --steps S --batch B --signs FILE ...

A batch in memory, forward, backward, step, the loss read out; with --checkpoint, DeepSpeed's own every K steps, and the
newest loaded at the start. One line a step goes to FILE: its number and the time at its end.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayproj.benchmarks.model import LATENTS, task
from rayproj.engine.engine import EngineConfig, import_deepspeed
from rayproj.engine.world import World


def engine(world: World, batch: int) -> Any:
    """A DeepSpeed engine with the settings of ours and none of the rest."""
    settings = EngineConfig()
    found, _, _, _ = import_deepspeed(world).initialize(
        model=(model := task().build()),
        optimizer=torch.optim.AdamW(model.parameters(), lr=settings.optimizer.lr),
        config={
            "train_micro_batch_size_per_gpu": batch,
            "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": settings.optimizer.clip_grad_norm,
            "steps_per_print": 10**9,
        },
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("steps", "batch", "every"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--signs", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # torchrun's agent keeps the store over a restart, and gloo would find the addresses of the dead in it.
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], agent)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    world = World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), "cpu")
    share = arguments.batch // world.world_size
    deepspeed = engine(world, share)
    if arguments.checkpoint and (arguments.checkpoint / "latest").exists():
        deepspeed.load_checkpoint(str(arguments.checkpoint))
    channels, *sides = LATENTS.fields["moments"].shape
    generator = torch.Generator().manual_seed(world.rank)
    data = torch.randn(LATENTS.num_samples, channels // 2, *sides, generator=generator)
    labels = torch.arange(LATENTS.num_samples) % len(LATENTS.classes)
    while deepspeed.global_steps < arguments.steps:
        index = torch.randint(0, len(data), (share,), generator=generator)
        x0, noise = data[index], torch.randn(share, *data.shape[1:], generator=generator)
        t = torch.sigmoid(torch.randn(share, generator=generator))
        x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        loss = (deepspeed(x, t, {"label": labels[index]}) - (noise - x0)).square().mean()
        deepspeed.backward(loss)
        deepspeed.step()
        loss.item()
        if arguments.every and deepspeed.global_steps % arguments.every == 0:
            deepspeed.save_checkpoint(str(arguments.checkpoint))
        if world.rank == 0:
            with arguments.signs.open("a") as file:
                file.write(f"{deepspeed.global_steps} {time.time()} {os.getpid()}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
