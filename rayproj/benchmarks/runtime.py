"""The training step of the whole runtime against the same model in a bare DeepSpeed loop.

Both run in the same process group of one rank and take turns, a block of steps each, so that a drift of the machine meets
both. The bare loop has what any DeepSpeed script has: a batch in memory, forward, backward, step, and the loss read out.
Ours has the rest too: keyed batches from a dataset on disk, EMA, agreement between ranks, metrics.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.denoiser import DenoiserConfig
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.checkpoint import CheckpointConfig
from rayproj.engine.engine import EngineConfig, import_deepspeed
from rayproj.engine.steps import PlainStep
from rayproj.engine.training import Recipe, TrainConfig, train
from rayproj.engine.world import World
from rayproj.storage.store import Store

BATCH, BLOCK, BLOCKS = 64, 10, 12
LATENTS = Header(
    "benchmark", {"moments": Field("npy", (8, 8, 8)), "label": Field("int")}, 2048, 256, tuple("0123456789")
)


def measure() -> list[dict[str, Any]]:
    """Rows for `jobs/benchmark.py`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as folder:
        store = dist.FileStore(f"{folder}/rendezvous", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        world = World(0, 1, 0, "cpu")
        ours, bare = interleaved(_ours(Path(folder), world), _bare(world))
        dist.destroy_process_group()
    row = {
        "metric": f"training step, UNet of 0.7 M parameters, batch {BATCH}, 1 rank",
        "unit": "s",
        "ours": ours,
        "peer": "bare DeepSpeed loop",
        "peer_value": bare,
        "ratio": ours / bare,
        "better": "lower",
        "goal": 1.03,
    }
    return [row]


def interleaved(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of a call of each, in alternating blocks; the first block of each warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for block in range(BLOCKS):
        pair = (0, 1) if block % 2 else (1, 0)  # ABBA: neither is always first
        for which in pair:
            for _ in range(BLOCK):
                began = time.perf_counter()
                (first, second)[which]()
                if block:
                    seconds[which].append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _task() -> DiffusionTask:
    return DiffusionTask(DiffusionConfig(latents="benchmark", denoiser=DenoiserConfig()), LATENTS, seed=0)


def _latents(folder: Path) -> Dataset:
    dataset = Dataset.create(str(folder / "latents"), LATENTS)
    rng = np.random.default_rng(0)
    for shard in range(LATENTS.num_shards):
        samples = [
            {"key": f"{i:08d}", "moments": rng.normal(size=(8, 8, 8)).astype(np.float32), "label": i % 10}
            for i in LATENTS.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "benchmark", 0.0)
    return dataset


def _ours(folder: Path, world: World) -> Callable[[], None]:
    """One step of `train` a call: the loop runs in a thread and is let through a step at a time."""
    import threading

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Gate(Batches):
        def at(self, step: int) -> dict[str, torch.Tensor]:
            if step:
                done.release()
            go.acquire()
            return super().at(step)

    class Link:
        attempt = "benchmark"

        def report(self, event: dict[str, Any]) -> None:
            pass

        def stop_requested(self) -> bool:
            return False

    config = TrainConfig(steps=BLOCK * BLOCKS + 1, batch=BATCH, checkpoint=CheckpointConfig(every_seconds=0))
    batches = Gate(Reader(_latents(folder)), Shuffled(2048, 256, BATCH, 0), 0, 1)
    recipe = Recipe(_task(), PlainStep(BATCH, 0, 1), batches, config)
    threading.Thread(target=train, args=(recipe, world, Store(str(folder / "run")), Link()), daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    return step


def _bare(world: World) -> Callable[[], None]:
    task, settings = _task(), EngineConfig()
    engine, _, _, _ = import_deepspeed(world).initialize(
        model=(model := task.build()),
        optimizer=torch.optim.AdamW(model.parameters(), lr=settings.optimizer.lr),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": settings.optimizer.clip_grad_norm,
            "steps_per_print": 10**9,
        },
    )
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2048, 4, 8, 8, generator=generator)
    labels = torch.arange(2048) % 10

    def step() -> None:
        index = torch.randint(0, 2048, (BATCH,), generator=generator)
        x0, noise = data[index], torch.randn(BATCH, 4, 8, 8, generator=generator)
        t = torch.sigmoid(torch.randn(BATCH, generator=generator))
        x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        loss = (engine(x, t, labels[index]) - (noise - x0)).square().mean()
        engine.backward(loss)
        engine.step()
        loss.item()

    return step
