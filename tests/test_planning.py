"""`rayproj plan` against what then happens: memory against measured peaks, bytes against a commit, ε against the ledger;
and every config of the project can be planned without Ray."""

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from rayproj import cli, planning
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.diffusion.denoiser import DenoiserConfig
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine import memory
from rayproj.engine.checkpoint import commits
from rayproj.engine.steps import PlainStep
from rayproj.engine.task import Batch
from rayproj.engine.training import Recipe, TrainConfig, train
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.privacy.ledger import epsilon_spent, spent
from rayproj.privacy.plan import PrivacyConfig, plan
from rayproj.privacy.step import PrivateStep
from rayproj.storage.store import Store
from tests.support import images
from tests.support.commands import ROOT
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

SIDE = 8
HEADER = Header(
    name="latents",
    fields={"moments": Field("npy", (8, SIDE, SIDE)), "label": Field("int")},
    num_samples=1000,
    shard_size=100,
    classes=tuple("abcdefghij"),
)
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "policy")  # no job's
CONFIGS += sorted(f"evaluate/{path.stem}" for path in (ROOT / "configs" / "evaluate").glob("*.yaml"))


class RandomBatches:
    def __init__(self, size: int) -> None:
        self.size = size

    def at(self, step: int) -> Batch:
        index = torch.arange(self.size)
        row = torch.stack([index, torch.full_like(index, step), torch.zeros_like(index)], dim=1)
        return {"row": row, "moments": torch.randn(self.size, 8, SIDE, SIDE), "label": index % 10}


def task_of(channels: tuple[int, ...]) -> DiffusionTask:
    return DiffusionTask(DiffusionConfig(latents="", denoiser=DenoiserConfig(channels=channels)), HEADER, seed=0)


def settings(stage: int, batch: int, private: PrivacyConfig | None) -> TrainConfig:
    config = TrainConfig(steps=2, batch=batch)
    config.engine.zero_stage = stage
    config.checkpoint.every_seconds = 0
    config.checkpoint.asynchronous = False  # how much of it would meet the next step's peak is a matter of timing
    if private:
        config.engine.optimizer.clip_grad_norm = 0
    return config


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(
    world: World, uri: str, channels: tuple[int, ...], batch: int, stage: int, privacy: PrivacyConfig | None
) -> dict[str, Any]:
    """Peak of a training above what a process has after a tiny one, which has loaded all that is loaded lazily."""

    def run(folder: str, channels: tuple[int, ...], batch: int) -> None:
        store, config = Store(f"{uri}/{folder}"), settings(stage, batch, privacy)
        step: Any = PlainStep(batch, 0, world.world_size)
        if privacy:
            step = PrivateStep(plan(privacy, HEADER.num_samples, 2), bytes(16), store, privacy.chunk)
        recipe = Recipe(task_of(channels), step, RandomBatches(batch // world.world_size), config)
        train(recipe, world, store, Recorder("a"))

    run("tiny", (32, 64), 2 * world.world_size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = resident("VmRSS")
    run("run", channels, batch)
    store = Store(f"{uri}/run")
    return {
        "base": base,
        "peak": resident("VmHWM") - base,
        "epsilon": epsilon_spent(spent(store), privacy.delta) if privacy else None,
    }


PRIVATE = PrivacyConfig(noise_multiplier=1.0, delta=1e-4, expected_batch=8, chunk=4, multiplicity=2)


@pytest.mark.parametrize(
    ("ranks", "stage", "channels", "batch", "privacy"),
    [
        (2, 0, (128, 256), 64, None),
        (1, 1, (128, 256), 32, None),
        (2, 2, (128, 256), 128, None),
        (2, 3, (128, 256), 64, None),
        (1, 2, (64, 128), 8, PRIVATE),
        pytest.param(2, 0, (64, 128), 8, PRIVATE, marks=pytest.mark.slow),
        (2, 3, (64, 128), 8, PRIVATE),
    ],
    ids=[
        *("ZeRO-0 of two", "ZeRO-1 alone", "ZeRO-2 of two", "ZeRO-3 of two"),
        *("private", "private, ZeRO-0 of two", "private, ZeRO-3 of two"),
    ],
)
def test_what_was_planned_is_what_is_used(  # type: ignore[no-untyped-def]
    tmp_path, ranks: int, stage: int, channels: tuple[int, ...], batch: int, privacy: PrivacyConfig | None
) -> None:
    model = memory.Model(task_of(channels))
    passing = planning.example_memory(model, HEADER, batch // ranks, privacy)
    layout = memory.Layout(stage, ranks)
    parts, _ = planning.rank_memory(model, layout, passing, settings(stage, batch, privacy), privacy)
    found = run_ranks(measure, ranks, str(tmp_path), channels, batch, stage, privacy)
    written = sum(file.size for file in commits(Store(f"{tmp_path}/run"))[-1].files)
    peak = max(rank["peak"] for rank in found)
    print(f"planned {sum(parts.values()) >> 20} MiB, measured {peak >> 20} MiB; base {found[0]['base'] >> 20} MiB")
    # A busy machine takes pages back that nobody asks for, and the measured peak is that much lower.
    assert 0.8 * peak < sum(parts.values()) < 1.3 * peak
    assert found[0]["base"] == pytest.approx(planning.BASE, rel=0.2)
    assert memory.checkpoint_bytes(model) == pytest.approx(written, rel=0.05)
    if privacy:
        assert plan(privacy, HEADER.num_samples, 2).epsilon() == pytest.approx(found[0]["epsilon"])


def write_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_can_be_planned_without_ray(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", None)
    path = ROOT / "configs" / f"{name}.yaml"
    job = name.split("/")[0]
    job = job if (ROOT / "jobs" / f"{job}.py").exists() else "chain"
    assert cli.main(["plan", job, str(path)]) == 0
    assert capsys.readouterr().out.startswith("job ")


def test_an_input_that_is_not_there_may_be_described(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    arguments = ["finetune_private", str(ROOT / "configs/finetune_private.yaml"), f"run.dir={tmp_path}/run"]
    arguments += ["diffusion.latents=nowhere", "diffusion.denoiser.channels=[32,64]"]
    (unknown,) = write_plan(capsys, *arguments)
    assert unknown["parameters"] is None and unknown["privacy"] is None and unknown["fits"] is None
    assert unknown["steps"] == 500 and unknown["samples"] == 512_000
    assert "'nowhere' is not there yet" in unknown["notes"][0]
    (known,) = write_plan(capsys, *arguments, "--samples", "30000", "--shape", "4x8x8", "--classes", "10")
    assert known["parameters"] and known["fits"] is True
    assert set(known["memory"]) == {"0", "1", "2", "3"}
    assert 7.9 < known["privacy"]["epsilon"] <= 8
    assert known["disk"] == known["commit"] * 3


def test_what_is_there_is_read(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    images.write(str(tmp_path / "data"))
    arguments = ["train_classifier", str(ROOT / "configs/train_classifier.yaml"), f"data={tmp_path}/data"]
    arguments += [f"run.dir={tmp_path}/run", "train.batch=12", "train.micro_batch=2", "train.steps=100"]
    (found,) = write_plan(capsys, *arguments, "cluster.ranks=3")
    assert found["epochs"] == pytest.approx(100 * 12 / 50)
    assert found["bundles"] == [{"CPU": 1.0}] * 3 or found["bundles"] == [{"CPU": 1.0, "GPU": 1.0}] * 3
    assert found["notes"] == [] and not (tmp_path / "run").exists()
    for ranks in range(1, 13):
        if ranks in found["world_sizes"]:
            PlainStep(12, 2, ranks)
        else:
            with pytest.raises(UserError):
                PlainStep(12, 2, ranks)
    assert cli.main(["plan", *arguments, "cluster.ranks=5"]) == 2
    assert "does not divide over 5 ranks" in capsys.readouterr().err


def test_a_plan_needs_no_images_to_change(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    """Some changes are made by libraries that want values."""
    words = ["train_classifier", str(ROOT / "configs/train_classifier.yaml"), f"run.dir={tmp_path}/run", "data=nowhere"]
    words += ["augment.rand_augment=2", "augment.obfuscate.names=[colour]"]
    (plan,) = write_plan(capsys, *words, "--samples", "100", "--shape", "1x32x32", "--classes", "10")
    assert plan["parameters"] and plan["fits"] is True


def test_planned_shards_are_as_large_as_written_ones(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dataset = Dataset.create(str(tmp_path), HEADER)
    samples = [
        {"key": f"{i:08d}", "moments": torch.zeros(8, SIDE, SIDE).numpy(), "label": i % 10}
        for i in HEADER.shard_range(0)
    ]
    commit_shard(dataset, 0, samples, "test", 0.1)
    written = dataset.records()[0].size * HEADER.num_shards
    assert planning.shards(HEADER)["bytes"] == pytest.approx(written, rel=0.02)


def test_too_little_is_said_with_the_remedy(tmp_path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(planning.torch.cuda, "device_count", lambda: 0)
    images.write(str(tmp_path / "data"))
    arguments = ["plan", "train_classifier", str(ROOT / "configs/train_classifier.yaml"), f"data={tmp_path}/data"]
    arguments += [f"run.dir={tmp_path}/run", "train.batch=100000", "cluster.ranks=100000"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "does not fit: memory" in said and "lower train.micro_batch" in said
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    assert cli.main(arguments) == 0
    assert "is not judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["jobs/nothing.py", "x.yaml"], "There is no job 'jobs/nothing.py'; give one of audit_privacy, benchmark"),
        (["benchmark", "x.yaml"], "has no config"),
        (["report", "x.yaml"], "The config file 'x.yaml' does not exist"),
        (["train_diffusion", str(ROOT / "configs/report.yaml")], "there is no 'root'"),
        (["report", str(ROOT / "configs/report.yaml"), "--shape", "4x4"], "write CxHxW"),
        (
            [
                "finetune_private",
                str(ROOT / "configs/finetune_private.yaml"),
                "train.engine.optimizer.clip_grad_norm=1",
            ],
            "set train.engine.optimizer.clip_grad_norm=0",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
