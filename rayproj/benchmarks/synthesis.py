"""Drawing, reading and planning of synthetic datasets: against a loop over the exported diffusers pipeline, webdataset and
Ray Data.

Each measurement is a process of its own, and ours and the peer's take turns.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from rayproj import config as configuration
from rayproj.benchmarks.runtime import Row, row
from rayproj.data.dataset import Dataset, Field, Header, ShardRecord
from rayproj.data.loader import Batches
from rayproj.data.order import Shuffled
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.engine.world import World
from rayproj.runtime.cluster import connect
from rayproj.runtime.leases import Leases
from rayproj.runtime.run import Run
from rayproj.storage.store import Store, to_json

ROUNDS, THREADS = 3, 2
SAMPLES, BATCH, STEPS = 512, 64, 16  # drawn, at once, and steps of the sampler
SIDE, IMAGES, SHARD = 64, 8192, 256  # of the images that are read
SHARDS = (1_000, 10_000, 100_000, 1_000_000)  # planned and committed in memory
ROOT = Path(__file__).resolve().parents[2]


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as name:
        folder = Path(name)
        _run("model", name)
        found = [_drawn(name), *_read(folder), *_streamed(name), _planned()]
    return found


def _run(what: str, *words: str) -> Any:
    """One measurement in a process of its own: what it writes last.

    Raises:
        RuntimeError: it failed, with the end of what it wrote.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "WANDB"))}
    env = {**kept, "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "rayproj.benchmarks.synthesis", what, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": str(THREADS)})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _in_turns(ways: list[Callable[[], float]]) -> list[float]:
    """The median of each, over rounds in which they take turns."""
    found: list[list[float]] = [[] for _ in ways]
    for number in range(ROUNDS):
        for k in range(len(ways)) if number % 2 else reversed(range(len(ways))):
            found[k].append(ways[k]())
        print(f"round {number + 1}: " + " ".join(f"{values[-1]:.4g}" for values in found), file=sys.stderr, flush=True)
    return [statistics.median(values) for values in found]


def _drawn(folder: str) -> Row:
    ours, peer = _in_turns([lambda: _run("pool", folder), lambda: _run("pipeline", folder)])
    what = f"images of {STEPS} steps with guidance, U-Net, {THREADS} threads"
    return row(what, "1/s", ours, "loop over the exported diffusers pipeline", peer, "higher", 1.3)


def _read(folder: Path) -> list[Row]:
    header = Header("read", {"image": Field("png", (3, SIDE, SIDE)), "label": Field("int")}, IMAGES, SHARD, ("a", "b"))
    dataset, rng = Dataset.create(str(folder / "read"), header), np.random.default_rng(0)
    ramp = np.linspace(0, 200, SIDE)[None, :, None] + np.zeros((3, SIDE, SIDE))
    for shard in range(header.num_shards):
        noise = rng.integers(0, 50, (SHARD, 3, SIDE, SIDE))
        samples = [{"key": f"{i:08d}", "image": (ramp + noise[k]).astype(np.uint8), "label": i % 2}
                   for k, i in enumerate(header.shard_range(shard))]  # fmt: skip
        commit_shard(dataset, shard, samples, "benchmark", 0.0)
    ways = ["ours", "webdataset", "webdataset with workers", "ray"]
    speed = dict(zip(ways, _in_turns([lambda way=way: _run("read", way, dataset.uri) for way in ways]), strict=True))  # type: ignore[misc]
    what = f"images read, PNG of {SIDE}x{SIDE}, shuffled, batches of {BATCH}"
    return [
        row(what, "1/s", speed["ours"], "webdataset in the process", speed["webdataset"], "higher", 1.5),
        row(
            what,
            "1/s",
            speed["ours"],
            f"webdataset, {THREADS} workers",
            speed["webdataset with workers"],
            "higher",
            1.5,
        ),
        row(what, "1/s", speed["ours"], "Ray Data's read_webdataset", speed["ray"], "higher"),
    ]


def _streamed(folder: str) -> list[Row]:
    stall = _run("stall", folder)
    overlapped, after = _in_turns([lambda: _run("overlapped", folder), lambda: _run("after", folder)])
    return [
        row(
            "a trainer's wait for data while it streams",
            "s/step",
            stall["wait"],
            "its step",
            stall["step"],
            "lower",
            0.02,
        ),
        row("generate and train", "s", overlapped, "one after the other", after, "lower"),
    ]


def _planned() -> Row:
    """Seconds of the driver's bookkeeping for a million shards, and for a tenth of them."""
    found = {n: _run("plan", str(n)) for n in SHARDS}
    for n, one in found.items():
        print(f"{n:>9,} shards: {one['seconds']:.2f} s, {one['mib']:.0f} MiB", file=sys.stderr)
    last, before = found[SHARDS[-1]], found[SHARDS[-2]]
    what = f"leases and commits of {SHARDS[-1]:,} shards in memory ({last['mib']:.0f} MiB of the driver)"
    return row(what, "s", last["seconds"], f"ten times those of {SHARDS[-2]:,}", 10 * before["seconds"], "lower")


# What follows runs in the processes.


def _job(name: str, *words: str) -> Any:
    from importlib import import_module

    module = import_module(f"rayproj.jobs.{name}")
    return module, configuration.load(module.Config, str(ROOT / "configs" / f"{name}.yaml"), list(words))


def model(folder: str) -> bool:
    """A run of an autoencoder and of a diffusion model, of a few steps, and the exported pipeline."""
    import torch.distributed as dist

    from rayproj.diffusion.encode import Encoder
    from rayproj.export import export
    from rayproj.jobs.encode_latents import latents_of

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world, train = World(0, 1, 0, "cpu"), ["train.batch=16", "train.steps=3", "train.preview_every=0"]
    source = ["data.source.kind=fashion_mnist", 'data.source.path=""', "data.fractions={a: 0.1, b: 0.9}"]
    module, config = _job("import_data", *source, f"data.out={folder}/data", f"run.dir={folder}/import")
    module.main(config)
    for name, words in (
        ("train_autoencoder", [f"data={folder}/data/a", "autoencoder.channels=[16,32]"]),
        ("train_diffusion", [f"diffusion.latents={folder}/latents", "diffusion.denoiser={channels: [64, 128]}"]),
    ):
        module, config = _job(name, *words, *train, f"run.dir={folder}/{name}", "cluster.ranks=1")
        with Run.open(name, config) as run:
            run.finish(module.worker(run.config, world, _Silent()))
        if name == "train_autoencoder":
            _, config = _job("encode_latents", f"images={{a: {folder}/data/a}}", f"autoencoder={folder}/{name}")
            latents = Dataset.create(f"{folder}/latents", latents_of(config, f"{folder}/data/a"))
            maker = {"images": f"{folder}/data/a", "autoencoder": f"{folder}/{name}", "batch": 64, "properties": {}}
            encoder = Encoder({**maker, "text": {}}, "cpu")
            for shard in range(latents.header.num_shards):
                commit_shard(latents, shard, encoder.make(shard), "benchmark", 0.0)
    export(f"{folder}/train_diffusion", f"{folder}/pipeline")
    return True


class _Silent:
    attempt = "benchmark"

    def beat(self, step: int | None) -> None: ...

    def report(self, event: dict[str, Any]) -> None: ...

    def stop_requested(self) -> bool:
        return False


def _generate(folder: str, out: str, *words: str) -> Run:
    """Generate with a pool of two actors of one thread each; returns the run."""
    given = [f"generate.model={folder}/train_diffusion", f"generate.out={out}", f"run.dir={out}-run", "consumers=[]"]
    sampler = f"generate.sampler={{steps: {STEPS}, solver: euler, guidance: 2.0}}"
    pool = ["pool.actors=2", "pool.cpus_per_actor=1", f"generate.samples={SAMPLES}", f"generate.batch={BATCH}"]
    module, config = _job("generate", *given, sampler, *pool, f"generate.shard_size={BATCH}", *words)
    module.main(config)
    return Run("generate", Store(f"{out}-run"), config)


def pool(folder: str) -> float:
    """Samples a second from the first begun shard to the last commit, without the start of Ray and the actors."""
    out = tempfile.mkdtemp(dir=folder)
    connect()
    run = _generate(folder, f"{out}/data")
    spans = [json.loads(line) for line in run.store.read("timeline.jsonl").splitlines()]
    spans = [span for span in spans if span["what"].startswith("shard")]
    return SAMPLES / (max(s["end"] for s in spans) - min(s["start"] for s in spans))


def pipeline(folder: str) -> float:
    """As a script would: draw a batch, save its images into a tar; the first batch is not counted."""
    import webdataset
    from diffusers import DiffusionPipeline

    torch.set_num_threads(THREADS)
    draw: Any = DiffusionPipeline.from_pretrained(f"{folder}/pipeline", trust_remote_code=True)
    draw.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(BATCH)]
    began, number = 0.0, 0
    with webdataset.TarWriter(f"{tempfile.mkdtemp(dir=folder)}/all.tar") as writer:
        for start in range(0, SAMPLES + BATCH, BATCH):
            if start == BATCH:
                began = time.perf_counter()
            for image in draw(labels, num_inference_steps=STEPS, guidance_scale=2.0).images:
                buffer = io.BytesIO()
                image.save(buffer, "png")
                writer.write({"__key__": f"{number:08d}", "png": buffer.getvalue(), "cls": number % 10})
                number += 1
    return SAMPLES / (time.perf_counter() - began)


def read(way: str, uri: str) -> float:
    """Images a second over one epoch, in tensors; the first tenth is not counted."""
    batches, seen, began = _readers(way, uri), 0, 0.0
    for batch in batches:
        assert batch.shape == (BATCH, 3, SIDE, SIDE) and batch.dtype == torch.uint8
        seen += len(batch)
        if seen >= IMAGES // 10 and not began:
            began, first = time.perf_counter(), seen
    return (seen - first) / (time.perf_counter() - began)


def _readers(way: str, uri: str) -> Iterator[torch.Tensor]:
    dataset = Dataset.open(uri)
    paths = [f"{uri}/{record.object}" for record in dataset.records().values()]
    if way == "ours":
        header = dataset.header
        order = Shuffled(header.num_samples, header.shard_size, BATCH, 0)
        source = Batches(Reader(dataset, ["image", "label"]), order, 0, 1)
        yield from (source.at(step)["image"] for step in range(IMAGES // BATCH))
    elif way == "ray":
        import ray

        ray.init("local", num_cpus=THREADS, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        shards = ray.data.read_webdataset(paths, suffixes=["image.png", "json"])
        for rows in shards.iter_batches(batch_size=BATCH, batch_format="numpy", local_shuffle_buffer_size=1000):
            images = np.stack(list(rows["image.png"]))
            if len(images) == BATCH:
                yield torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    else:
        import webdataset

        shards = (
            webdataset.WebDataset(paths, shardshuffle=100).shuffle(1000).decode("rgb8").to_tuple("image.png", "json")
        )
        shards = shards.map_tuple(
            lambda image: torch.from_numpy(image).permute(2, 0, 1), lambda values: values["label"]
        )
        workers = THREADS if "workers" in way else 0
        shards = shards.batched(BATCH, partial=False)
        for images, _ in torch.utils.data.DataLoader(shards, batch_size=None, num_workers=workers):
            yield images


def stall(folder: str) -> dict[str, float]:
    """What a trainer waits for data of its step, while a producer that is faster than it writes them."""
    import threading

    out, side = tempfile.mkdtemp(dir=folder), 32
    header = Header("stream", {"image": Field("png", (1, side, side)), "label": Field("int")}, 4096, 128, ("a", "b"))
    dataset, images = (
        Dataset.create(f"{out}/data", header),
        np.random.default_rng(0).integers(0, 256, (128, 1, side, side)),
    )

    def write() -> None:
        for shard in range(header.num_shards):
            samples = [{"key": f"{i:08d}", "image": images[k].astype(np.uint8), "label": i % 2}
                       for k, i in enumerate(header.shard_range(shard))]  # fmt: skip
            commit_shard(dataset, shard, samples, "benchmark", 0.0)
            time.sleep(0.05)

    connect()
    threading.Thread(target=write, daemon=True).start()
    given = [f"data={dataset.uri}", "consumer=trainer", f"run.dir={out}/run", "cluster.ranks=1", "train.batch=64"]
    module, config = _job("train_classifier", *given, "train.steps=60", "train.log_every=5", "train.preview_every=0")
    module.main(config)
    rows = [json.loads(line) for line in Store(f"{out}/run").read("metrics.jsonl").splitlines()]
    rows = [row for row in rows if "data_wait_seconds" in row][2:]
    return {
        k: statistics.mean(row[f"{v}_seconds"] for row in rows) for k, v in (("wait", "data_wait"), ("step", "step"))
    }


def _train(out: str, *words: str) -> None:
    given = [f"data={out}/data", f"run.dir={out}/train", "cluster.ranks=1", "train.batch=64", "train.preview_every=0"]
    module, config = _job("train_classifier", *given, f"train.steps={SAMPLES // 64}", *words)
    module.main(config)


def overlapped(folder: str) -> float:
    """Seconds until both are done, the classifier reading while the images are drawn."""
    out, began = tempfile.mkdtemp(dir=folder), time.perf_counter()
    stages = {
        "generate": ["generate", folder, out, "consumers=[trainer]"],
        "train": ["train", out, "consumer=trainer", "wait_seconds=300"],
    }
    command = [sys.executable, "-m", "rayproj.benchmarks.synthesis"]
    running = [subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL) for words in stages.values()]
    if any(process.wait() for process in running):
        raise RuntimeError("A stage failed.")
    return time.perf_counter() - began


def after(folder: str) -> float:
    """The same, one after the other."""
    out, began = tempfile.mkdtemp(dir=folder), time.perf_counter()
    for words in (["generate", folder, out], ["train", out]):
        command = [sys.executable, "-m", "rayproj.benchmarks.synthesis", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def plan(shards: str) -> dict[str, float]:
    """Lease and commit that many shards on a store in memory, whose data are nothing."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-", dir=memory) as folder:
        return _plan(int(shards), folder)


def _plan(count: int, uri: str) -> dict[str, float]:
    dataset = Dataset.create(uri, Header("planned", {"x": Field("int")}, count, 1, ()))
    leases, makers = Leases(count, 600.0), [f"maker {k}" for k in range(64)]
    start = psutil.Process().memory_info().rss
    began = time.perf_counter()
    held: dict[str, int] = {}
    for tick in range(count + len(makers)):
        maker = makers[tick % len(makers)]
        if maker in held:
            shard = held.pop(maker)
            record = ShardRecord(shard, f"shards/{shard}.tar", "0" * 64, 0, 1, {}, maker, 0.0, 0.0)
            dataset.store.put_once(f"commits/{shard:06d}.json", to_json(asdict(record)))
            leases.finish(shard, tick * 0.01)
        if (found := leases.grant(maker, tick * 0.01)) is not None:
            held[maker] = found
    assert leases.complete and len(dataset.store.list("commits")) == count
    return {"seconds": time.perf_counter() - began, "mib": (psutil.Process().memory_info().rss - start) / 2**20}


def main(what: str, *words: str) -> Any:
    if what == "generate":
        connect()
        _generate(words[0], f"{words[1]}/data", *words[2:])
        return True
    if what == "train":
        connect()
        _train(*words)
        return True
    ways: dict[str, Callable[..., Any]] = {
        "model": model, "pool": pool, "pipeline": pipeline, "read": read, "stall": stall, "overlapped": overlapped,
        "after": after, "plan": plan,
    }  # fmt: skip
    return ways[what](*words)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
