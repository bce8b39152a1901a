"""Failure discovery: against a plain loop over the same generator and classifier, and against testing slices at random.

Each measurement of speed is a process of its own, and ours and the peer's take turns.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayproj import config as configuration
from rayproj.benchmarks import planted, synthesis
from rayproj.benchmarks.runtime import Row, row
from rayproj.classifiers.networks import ClassifierConfig, ConvNet
from rayproj.data.dataset import Dataset
from rayproj.data.writer import commit_shard
from rayproj.discovery.examine import OWN, Bench
from rayproj.discovery.generators import Asked
from rayproj.discovery.loop import confirming, discover, tested
from rayproj.discovery.propose import Proposal
from rayproj.discovery.search import DiscoverConfig, prepared, shared
from rayproj.discovery.slices import Slice, Term
from rayproj.jobs.discover_failures import Config
from rayproj.runtime.cluster import connect
from rayproj.runtime.group import import_entry
from rayproj.runtime.producer import PoolConfig, produce
from rayproj.runtime.run import Run, RunConfig

ROUNDS, THREADS = 3, 2
IMAGES, SHARD = 512, 64  # examined for the speed
SEARCHES, BUDGET = 4, 800  # of each bug, and images of each search


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    with tempfile.TemporaryDirectory(prefix="rayproj-bench-") as folder:
        _run("model", folder)
        speeds: dict[str, list[float]] = {"pool": [], "loop": []}
        for number in range(ROUNDS):
            for way in list(speeds) if number % 2 else reversed(speeds):
                speeds[way].append(_run(way, folder))
        ours, loop = (statistics.median(speeds[way]) for way in ("pool", "loop"))
        found = _run("findings", folder)
    what, peer = "images drawn and classified, U-Net of 16 steps", f"a loop in one process, {THREADS} threads"
    return [
        row(what, "1/s", ours, peer, loop, "higher", 1.0),
        row(
            f"planted bugs named, each in a search of {BUDGET} images",
            "1/1000",
            found["search"],
            "slices of one term at random, same tests and budget",
            found["random"],
            "higher",
        ),
        row("findings that are not of the planted bug", "share", found["others"], "slices at random", found["others_random"],
            "lower"),
    ]  # fmt: skip


def _run(what: str, folder: str) -> Any:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "WANDB"))}
    env = {**kept, "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "rayproj.benchmarks.discovery", what, folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": str(THREADS)})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def model(folder: str) -> bool:
    """A diffusion model of a few steps, and an untrained classifier: both cost what trained ones do."""
    synthesis.model(folder)
    torch.manual_seed(0)
    network = ConvNet(ClassifierConfig(), 1, 10).eval()
    torch.jit.trace(network, torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).save(f"{folder}/classifier.pt")
    return True


def _speed_config(folder: str, out: str) -> DiscoverConfig:
    names = Dataset.open(f"{folder}/data/a").header.classes
    values = {
        "classifier": {"model": f"{folder}/classifier.pt", "classes": list(names)},
        "generator": {"model": f"{folder}/train_diffusion", "sampler": {"steps": 16, "guidance": 2.0}},
        "words": False,
        "out": out,
        "shard_size": SHARD,
        "batch": SHARD,
    }
    return configuration.from_dict(DiscoverConfig, values)


def pool(folder: str) -> float:
    """Images a second of a stage that confirms, from the first begun shard to the last commit."""
    out = tempfile.mkdtemp(dir=folder)
    config = Config(_speed_config(folder, out), RunConfig(dir=f"{out}/run"))
    connect()

    with Run.open("discover_failures", config) as run:

        def make(dataset: Dataset, maker: str, values: dict[str, Any]) -> None:
            produce(run, dataset, maker, PoolConfig(actors=THREADS, cpus_per_actor=1), values)

        search = prepared(config.discover, 0, make)
        search.run("confirm", shared([Slice(label) for label in search.bench.labels], IMAGES), confirming=True)
        spans = [json.loads(line) for line in run.store.read("timeline.jsonl").splitlines()]
    return IMAGES / (max(s["end"] for s in spans) - min(s["start"] for s in spans))


def loop(folder: str) -> float:
    """The same images as a script would draw and classify them, without keeping any; the first batch is not counted."""
    torch.set_num_threads(THREADS)
    bench = Bench(_speed_config(folder, ""), 0, "cpu")
    slices, began = [Slice(label) for label in bench.labels], 0.0
    for start in range(0, IMAGES + SHARD, SHARD):
        if start == SHARD:
            began = time.perf_counter()
        ids = np.arange(start, start + SHARD)
        asked = Asked([slices[i % len(slices)] for i in ids], ids, np.full(SHARD, -1))
        bench.classifiers[OWN](torch.from_numpy(bench.generator.draw(asked)["image"])).max(1)
    return IMAGES / (time.perf_counter() - began)


def findings(folder: str) -> dict[str, float]:
    """Planted bugs that are named, by 1,000 images, over searches of several bugs and seeds; and the share of findings that
    are of something else: these classifiers have weaknesses that nobody planted, so that it is no error rate."""
    torch.set_num_threads(THREADS)
    images = planted.write(f"{folder}/figures", planted.figures("test", 99)).uri
    counted = {"search": [0, 0, 0, 0], "random": [0, 0, 0, 0]}  # bugs found, images, other findings, findings
    for bug, seed in product(planted.BUGS, range(SEARCHES)):
        values = {
            "classifier": {
                "model": planted.train(Path(folder, f"{bug}-{seed}.pt"), bug, seed),
                "classes": list(planted.LABELS),
                "probabilities": True,
            },
            "generator": {"images": images, "group": "role"},
            "attributes": {name: [] for name in planted.BUGS},
            "words": False,
            "images": BUDGET,
        }
        for way, search in (("search", discover), ("random", at_random)):
            given = configuration.from_dict(DiscoverConfig, {**values, "out": f"{folder}/{way}-{bug}-{seed}"})
            result = search(given, seed, _make)
            true = [_is_planted(Slice.from_json(f["slice"]), bug) for f in result["findings"]]
            now = (any(true), result["images"], len(true) - sum(true), len(true))
            counted[way] = [a + int(b) for a, b in zip(counted[way], now, strict=True)]
    per = {way: 1000 * count[0] / count[1] for way, count in counted.items()}
    other = {way: count[2] / max(1, count[3]) for way, count in counted.items()}
    return {**per, "others": other["search"], "others_random": other["random"]}


def at_random(config: DiscoverConfig, seed: int, make: Any) -> dict[str, Any]:
    """Slices of one term drawn at random, all images for their tests."""
    search, rng = prepared(config, seed, make), random.Random(seed)
    terms = [Term(name, value) for name, values in search.bench.attributes.items() for value in values]
    every = [Slice.of(label, [term]) for label in search.bench.labels for term in terms]
    slices = rng.sample(every, config.slices)
    wrong = dict(zip(planted.LABELS, reversed(planted.LABELS), strict=True))
    on = search.run("confirm", confirming(slices, config.images), confirming=True)
    tests = tested(search, [Proposal(of, wrong[of.label], 1.0) for of in slices], [on])
    return {"findings": [test for test in tests if test["finding"]], "images": search.looked_at}


def _is_planted(of: Slice, bug: str) -> bool:
    """Women of what goes with men in the training images, and nothing else."""
    return of.label == "female" and len(of.terms) == 1 and of.values.get(bug) in planted.BUGS[bug][0]


def _make(dataset: Dataset, maker: str, values: dict[str, Any]) -> None:
    own = import_entry(maker)(values, "cpu")
    for shard in range(dataset.header.num_shards):
        commit_shard(dataset, shard, own.make(shard), "benchmark", 0.0)


if __name__ == "__main__":
    ways = {"model": model, "pool": pool, "loop": loop, "findings": findings}
    print(json.dumps(ways[sys.argv[1]](sys.argv[2])))
