"""Checkpoints: what is committed is whole, what is damaged is never loaded, and a resumed run is the undisturbed one."""

import pytest
import torch
from safetensors.torch import load_file

from rayproj.engine import checkpoint
from rayproj.engine.checkpoint import Best, CheckpointConfig, Commit, commits, due, expired, load_ema
from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support import regression
from tests.support.ranks import run_ranks


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a["step"] == b["step"]
        for kind in ("weights", "ema"):
            for name, tensor in b[kind].items():
                assert torch.equal(a[kind][name], tensor), (kind, name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(regression.run, 2, str(tmp_path_factory.mktemp("run")), regression.config(10), "only")


def test_a_stop_request_commits_and_the_rest_equals_undisturbed(tmp_path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    uri, settings = str(tmp_path), regression.config(10)
    stopped = run_ranks(regression.run, 2, uri, settings, "first", None, 3)
    assert [r["step"] for r in stopped] == [3, 3]
    assert commits(Store(uri))[-1].step == 3
    assert_same(run_ranks(regression.run, 2, uri, settings, "second"), undisturbed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    store, settings = Store(str(tmp_path)), regression.config(10)
    run_ranks(regression.run, 2, store.uri, regression.config(8), "first")
    newest = commits(store)[-1]
    victim = next(f for f in newest.files if f.path == "exp_avg/part-00001.safetensors")
    data = bytearray(store.at(newest.folder).read(victim.path))
    data[len(data) // 2] ^= 1
    store.at(newest.folder).write(victim.path, bytes(data))
    found = run_ranks(regression.run, 2, store.uri, settings, "second")
    warnings = [e["text"] for e in found[0]["events"] if e["type"] == "warning"]
    assert len(warnings) == 1 and "step 8" in warnings[0] and victim.path in warnings[0]
    assert {"type": "resumed", "step": 4, "ranks": 2} in found[0]["events"]
    assert_same(found, undisturbed)


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
    return run_ranks(train_without_dropout, 1, uri, regression.config(9), "only")[0]


SHAPES = [(1, 1), (2, 2), (3, 3), (2, 3), (1, 2), (3, 1)]  # (ranks, ZeRO stage)


@pytest.mark.parametrize(("before", "after"), list(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True)))
def test_a_run_goes_on_at_another_world_size_and_stage(tmp_path, without_dropout, before, after) -> None:  # type: ignore[no-untyped-def]
    """Equal to rounding to the run that never changed, a frozen parameter and a buffer included."""
    uri = str(tmp_path)
    run_ranks(train_without_dropout, before[0], uri, regression.config(5, before[1]), "first")
    found = run_ranks(train_without_dropout, after[0], uri, regression.config(9, after[1]), "second")
    assert {"type": "resumed", "step": 5, "ranks": after[0]} in found[0]["events"]
    for rank in found:
        for kind in ("weights", "ema"):
            assert set(rank[kind]) == set(without_dropout[kind])
            for name, expected in without_dropout[kind].items():
                torch.testing.assert_close(rank[kind][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [1, 3])
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
