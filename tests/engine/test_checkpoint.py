"""Checkpoints: what is committed is whole, what is damaged is never loaded, and a resumed run is the undisturbed one."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayproj.engine import checkpoint
from rayproj.engine.checkpoint import Best, CheckpointConfig, Commit, Saver, commits, due, expired, load_ema, restore
from rayproj.engine.engine import Engine, Precision, Snapshot
from rayproj.errors import UserError
from rayproj.storage.store import IntegrityError, Store, sha256_hex
from tests.support import regression
from tests.support.ranks import run_ranks
from tests.support.s3 import S3Server, answering


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a["step"] == b["step"]
        for kind in ("weights", "ema"):
            for name, tensor in b[kind].items():
                assert torch.equal(a[kind][name], tensor), (kind, name)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[dict]]:
    store = Store(str(tmp_path_factory.mktemp("run")))
    return store, run_ranks(regression.run, 2, store.uri, regression.config(10), "only")


@pytest.fixture(scope="module")
def undisturbed(whole_run) -> list[dict]:  # type: ignore[no-untyped-def]
    return whole_run[1]


def test_a_stop_request_commits_and_the_rest_equals_undisturbed(tmp_path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    uri, settings = str(tmp_path), regression.config(10)
    stopped = run_ranks(regression.run, 2, uri, settings, "first", None, 3)
    assert [r["step"] for r in stopped] == [3, 3]
    assert commits(Store(uri))[-1].step == 3
    assert_same(run_ranks(regression.run, 2, uri, settings, "second"), undisturbed)


@pytest.fixture(scope="module")
def run_of_8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With commits of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run-of-8")
    run_ranks(regression.run, 2, str(folder), regression.config(8), "first")
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def scramble(file: Path) -> None:
    """As many bytes, which no parser would take."""
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped bit": ("exp_avg/part-00001.safetensors", flip, "sha256"),
    "truncated": ("master/part-00000.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes and sha256"),
    "missing": ("ema/part-00001.safetensors", Path.unlink, "is not there"),
    "unreadable tensors": ("exp_avg_sq/part-00000.safetensors", scramble, "its record says"),
    "unreadable position": ("state.json", scramble, "its record says"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_before_anything_is_parsed_and_named_and_the_commit_before_is_used(
    tmp_path, run_of_8, undisturbed, name
) -> None:  # type: ignore[no-untyped-def]
    path, damage, says = DAMAGE[name]
    store = Store(str(shutil.copytree(run_of_8, tmp_path / "run")))
    newest = commits(store)[-1]
    damage(tmp_path / "run" / newest.folder / path)
    found = run_ranks(regression.run, 2, store.uri, regression.config(10), "second")
    (warning,) = [e["text"] for e in found[0]["events"] if e["type"] == "warning"]
    assert re.search(rf"step 8 is damaged \(.*{re.escape(path)}.*\); trying the one before it", warning)
    assert says in warning
    assert {"type": "resumed", "step": 4, "ranks": 2} in found[0]["events"]
    assert_same(found, undisturbed)
    assert store.exists("checkpoints/step-00000008/DAMAGED.json"), "for a person to look at"
    assert [c.step for c in commits(store)] == [8, 10], "the damaged step is committed anew"


def test_where_every_commit_is_damaged_a_person_is_asked(tmp_path, run_of_8) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(shutil.copytree(run_of_8, tmp_path / "run")))
    for commit in commits(store):
        flip(tmp_path / "run" / commit.folder / "master" / "part-00001.safetensors")
    says = r"UserError: All checkpoints below .*/checkpoints are damaged; start again in another run\.dir"
    with pytest.raises(AssertionError, match=says):  # with what the ranks wrote to stderr
        run_ranks(regression.run, 2, store.uri, regression.config(10), "second")


def test_damaged_averages_are_not_handed_out(tmp_path, run_of_8) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(shutil.copytree(run_of_8, tmp_path / "run")))
    scramble(tmp_path / "run" / commits(store)[-1].folder / "ema" / "part-00000.safetensors")
    with pytest.raises(IntegrityError, match=r"ema/part-00000\.safetensors has .* its record says"):
        load_ema(store)


def test_a_commit_lists_every_file_with_its_hash(run_of_8) -> None:  # type: ignore[no-untyped-def]
    for commit in commits(Store(str(run_of_8))):
        folder = run_of_8 / commit.folder
        there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        lists = {f"files-{rank:05d}.json" for rank in range(2)}
        assert {f.path: (f.size, f.sha256) for f in commit.files} == {
            path: (len(data), sha256_hex(data)) for path, data in there.items() if path not in lists
        }


def test_a_run_on_s3_is_resumed_and_equals_the_one_on_a_local_disk(server: S3Server, whole_run) -> None:  # type: ignore[no-untyped-def]
    local, undisturbed = whole_run
    store = Store(f"s3://{server.bucket()}/runs/one")
    run_ranks(regression.run, 2, store.uri, regression.config(5), "first", env=server.env)
    assert [c.step for c in commits(store)] == [4, 5]
    found = run_ranks(regression.run, 2, store.uri, regression.config(10), "second", env=server.env)
    assert {"type": "resumed", "step": 5, "ranks": 2} in found[0]["events"]
    assert_same(found, undisturbed)
    assert contents(store) == contents(local)


def contents(store: Store) -> list[tuple[int, tuple]]:  # type: ignore[type-arg]
    """Steps, and files with their hashes, of the commits."""
    return [(commit.step, commit.files) for commit in commits(store)]


def test_saving_beside_the_training_writes_what_saving_at_once_does(tmp_path, whole_run) -> None:  # type: ignore[no-untyped-def]
    local, undisturbed = whole_run
    settings = regression.config(10)
    assert settings.checkpoint.asynchronous
    settings.checkpoint.asynchronous = False
    assert_same(run_ranks(regression.run, 2, str(tmp_path), settings, "only"), undisturbed)
    assert contents(Store(str(tmp_path))) == contents(local)


class Slow(regression.Regression):
    def losses(self, model, batch):  # type: ignore[no-untyped-def]
        time.sleep(0.2)
        return super().losses(model, batch)


class Steps(regression.Recorder):
    step: int | None = 0

    def beat(self, step: int | None) -> None:
        self.step = step


def train_until_refused(world, uri, settings):  # type: ignore[no-untyped-def]
    link = Steps("a")
    with pytest.raises(UserError) as raised:
        regression.run(world, uri, settings, "a", Slow(), link=link)
    return link.step, str(raised.value)


def test_an_upload_that_fails_stops_the_training_before_the_next_is_due(server: S3Server) -> None:
    """Each step takes 0.2 s, and the refusal comes at once."""
    store = Store(f"s3://{server.bucket()}/run")

    def is_a_part(environ) -> bool:  # type: ignore[no-untyped-def]
        return environ["REQUEST_METHOD"] == "PUT" and "master/part" in environ["PATH_INFO"]

    with server.disturbed(answering("403 Forbidden", "AccessDenied", is_a_part)):
        ((step, says),) = run_ranks(
            train_until_refused, 1, store.uri, regression.config(30, every_steps=8), env=server.env
        )
    assert 8 <= step < 15
    assert f"{store.uri}/checkpoints/step-00000008/a-a may not be used" in says
    assert commits(store) == []


def save_and_check(world, uri):  # type: ignore[no-untyped-def]
    """Where the run's folder is to be, there is a file."""
    settings = regression.config(4)
    engine = Engine(regression.Regression().build(), settings.engine, 4, world)
    found = []
    for asynchronous in (True, False):
        saver = Saver(engine, Store(uri), "a", CheckpointConfig(asynchronous=asynchronous))
        try:
            saver.save({})
            found.append("save returned")
            while not saver._pending.done():
                time.sleep(0.01)
            saver.check()
        except OSError as error:
            found.append(type(error).__name__)
            saver.check()  # told once
            saver.wait()
    return found


def test_what_a_save_failed_with_is_raised_by_the_next_look_or_at_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "checkpoints").write_text("in the way")
    (found,) = run_ranks(save_and_check, 1, str(tmp_path))
    assert found == ["save returned", "NotADirectoryError", "NotADirectoryError"]


def save_train_on_and_restore(world, uri, zero_stage):  # type: ignore[no-untyped-def]
    """Compares the state that is saved with what it is a step later, and in a new engine before and after `restore`."""
    settings = regression.config(5, zero_stage, every_steps=0)
    task, batches = regression.Regression(), regression.KeyedBatches(world.rank, world.world_size)
    step = regression.PlainStep(settings.batch, 0, world.world_size)
    torch.manual_seed(world.rank)
    engine = Engine(task.build(), settings.engine, 5, world)
    for number in range(3):
        step(engine, task, batches.at(number))
    saver = Saver(engine, Store(uri), "a", settings.checkpoint)
    snapshot = engine.snapshot()
    copy = flatten(snapshot)
    saver.save({"loss": 1.0})
    step(engine, task, batches.at(3))
    later = {key: not torch.equal(value, copy[key]) for key, value in flatten(engine.snapshot()).items()}
    saver.wait()
    kept = {key: torch.equal(value, copy[key]) for key, value in flatten(snapshot).items()}
    torch.distributed.barrier()
    anew = Engine(task.build(), settings.engine, 5, world)
    torch.manual_seed(99)
    fresh = flatten(anew.snapshot())
    restored = restore(anew, Store(uri), warn=lambda text: None)
    differs = {key: key not in fresh or not torch.equal(value, fresh[key]) for key, value in copy.items()}
    return {
        **{"step": restored, "position": snapshot.position, "again": anew.snapshot().position},
        **{"saved": copy, "restored": flatten(anew.snapshot()), "kept": kept, "later": later, "differs": differs},
    }


def flatten(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    sharded = {f"{kind}/{key}": t.clone() for kind, parts in snapshot.sharded.items() for key, t in parts.items()}
    return sharded | {f"generator/{name}": t.clone() for name, t in snapshot.generators.items()}


def test_everything_comes_along_and_what_is_trained_meanwhile_does_not(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for found in run_ranks(save_train_on_and_restore, 2, str(tmp_path), 3):
        assert found["step"] == 3
        assert found["again"] == found["position"]
        assert found["position"]["samples_seen"] == 3 * regression.KeyedBatches.size
        assert set(found["saved"]) == set(found["restored"])
        for key, saved in found["saved"].items():
            assert torch.equal(found["restored"][key], saved), key
        assert all(found["kept"].values()), "a snapshot is a copy"
        assert all(found["later"].values()) and all(found["differs"].values()), "else this would show nothing"
        kinds = {key.split("/")[0] for key in found["saved"]}
        assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema", "generator"}


def test_a_commit_knows_what_was_logged_before_it(run_of_8) -> None:  # type: ignore[no-untyped-def]
    record = json.loads((run_of_8 / "checkpoints" / "step-00000008" / "COMMIT.json").read_text())
    assert set(record["metrics"]) == {"loss"} and record["metrics"]["loss"] > 0


def test_the_averaged_weights_are_read_without_the_engine_at_any_world_size(tmp_path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    run_ranks(regression.run, 2, str(tmp_path), regression.config(10), "only")
    merged, commit = load_ema(Store(str(tmp_path)))
    assert commit.step == 10
    expected = undisturbed[0]["ema"]
    assert set(merged) == set(undisturbed[0]["weights"]) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


class WithoutDropout(regression.Regression):
    """Dropout draws from torch's generators, which another world size does not have."""

    def build(self) -> torch.nn.Module:
        model = super().build()
        assert isinstance(model, torch.nn.Sequential)
        model[2] = torch.nn.Identity()
        model.register_buffer("calls", torch.zeros(3))
        model[0].bias.requires_grad_(False)
        return model


def train_without_dropout(world, uri, settings, attempt):  # type: ignore[no-untyped-def]
    return regression.run(world, uri, settings, attempt, WithoutDropout())


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    uri = str(tmp_path_factory.mktemp("run"))
    return run_ranks(train_without_dropout, 1, uri, regression.config(14), "only")[0]


@pytest.mark.parametrize(
    "shapes",  # (ranks, ZeRO stage), of starts that do two steps each
    [
        [(1, 1), (2, 2), (3, 3), (2, 3), (1, 2), (3, 1), (1, 1)],
        [(2, 2), (3, 0), (2, 0), (2, 3), (1, 0), (2, 1), (3, 0)],
    ],
    ids=["sharded", "ZeRO-0 between"],
)
def test_a_run_goes_on_at_another_world_size_and_stage(tmp_path, without_dropout, shapes) -> None:  # type: ignore[no-untyped-def]
    """Equal to rounding to the run that never changed, a frozen parameter and a buffer included."""
    for start, (ranks, zero_stage) in enumerate(shapes):
        settings = regression.config(2 * start + 2, zero_stage)
        found = run_ranks(train_without_dropout, ranks, str(tmp_path), settings, f"start-{start}")
        assert {"type": "resumed", "step": 2 * start, "ranks": ranks} in found[0]["events"]
    for rank in found:
        for kind in ("weights", "ema"):
            assert set(rank[kind]) == set(without_dropout[kind])
            for name, expected in without_dropout[kind].items():
                torch.testing.assert_close(rank[kind][name], expected, rtol=1e-5, atol=1e-6)


class InBf16(WithoutDropout):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return super().losses(lambda x: model(x.bfloat16()).float(), batch)  # type: ignore[arg-type]


class Forgetful(InBf16):
    """As when what a run began with is gone."""

    def build(self) -> torch.nn.Module:
        model: Any = super().build()
        model[0].bias.data.zero_()
        return model


def train_in_bf16(world, uri):  # type: ignore[no-untyped-def]
    for steps, task in ((2, InBf16()), (4, Forgetful())):
        settings = regression.config(steps, 1)
        settings.engine.precision = Precision.bf16
        found = regression.run(world, uri, settings, f"to {steps}", task)
    return found["ema"]


def test_what_is_frozen_is_kept_in_fp32_where_the_model_is_in_bf16(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found, drawn = run_ranks(train_in_bf16, 1, str(tmp_path))[0], WithoutDropout().build().state_dict()["0.bias"]
    assert torch.equal(found["0.bias"], drawn) and not torch.equal(drawn.bfloat16().float(), drawn)
    assert torch.equal(load_ema(Store(str(tmp_path)))[0]["0.bias"], drawn)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_every_stage_resumes_bit_for_bit(tmp_path, zero_stage) -> None:  # type: ignore[no-untyped-def]
    straight, halves = str(tmp_path / "straight"), str(tmp_path / "halves")
    expected = run_ranks(regression.run, 2, straight, regression.config(9, zero_stage), "only")
    run_ranks(regression.run, 2, halves, regression.config(5, zero_stage), "first")
    assert_same(run_ranks(regression.run, 2, halves, regression.config(9, zero_stage), "second"), expected)


def test_only_the_newest_are_kept_and_nothing_uncommitted_counts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = Store(str(tmp_path))
    run_ranks(regression.run, 2, store.uri, regression.config(10, every_steps=2), "first")
    assert [c.step for c in commits(store)] == [8, 10]
    assert {path.split("/")[1] for path in store.list("checkpoints")} == {"step-00000008", "step-00000010"}
    store.put_once("checkpoints/step-00000099/a-x/state.json", b"{}")
    assert [c.step for c in commits(store)] == [8, 10]
    last = commits(store)[-1]
    part = tmp_path / last.folder / "ema" / "part-00000.safetensors"
    assert all("@" in key for key in load_file(str(part)))


def test_no_commit_no_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="no committed checkpoint; train it first"):
        load_ema(Store(str(tmp_path)))


def test_when_to_checkpoint() -> None:
    by_steps = CheckpointConfig(every_steps=5, every_seconds=0)
    assert [s for s in range(1, 12) if due(by_steps, s, 1e9)] == [5, 10]
    by_time = CheckpointConfig(every_seconds=60)
    assert not due(by_time, 7, 59.9) and due(by_time, 7, 60)


def at(step: int, **metrics: float) -> Commit:
    return Commit(step, "a", 1, 2, (), metrics, 0.0)


def test_what_to_keep() -> None:
    config = CheckpointConfig(keep_last=2, keep_every=100)
    assert expired(config, map(at, [100, 130, 120, 110, 200])) == [110, 120]
    assert expired(config, [at(7)]) == []
    assert checkpoint.CheckpointConfig(keep_last=0).problems()


def test_the_best_are_kept_by_a_metric_and_of_equals_the_newer() -> None:
    done = [at(1, loss=3.0), at(2, loss=1.0), at(3), at(4, loss=1.0), at(5, loss=2.0)]
    assert expired(CheckpointConfig(keep_last=1, keep_best=1), done) == [1, 2, 3]
    assert expired(CheckpointConfig(keep_last=1, keep_best=2), done) == [1, 3]
    assert expired(CheckpointConfig(keep_last=1, keep_best=1, best=Best.highest), done) == [2, 3, 4]
    assert expired(CheckpointConfig(keep_last=1, keep_best=1, best_metric="accuracy"), done) == [1, 2, 3, 4]
