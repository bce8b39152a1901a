"""Checkpoints: what is committed is whole, what is damaged is never loaded, and a resumed run is the undisturbed one."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from rayproj.engine import checkpoint
from rayproj.engine.checkpoint import CheckpointConfig, commits, due, expired, load_ema
from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support import regression
from tests.support.ranks import run_ranks

POINTS = ["train.after_step", "checkpoint.before_write", "checkpoint.before_upload", "checkpoint.before_list"]
POINTS += ["checkpoint.before_commit", "checkpoint.after_commit"]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a["step"] == b["step"]
        assert torch.equal(a["ema"], b["ema"])
        for name, tensor in b["weights"].items():
            assert torch.equal(a["weights"][name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(regression.run, 2, str(tmp_path_factory.mktemp("run")), regression.config(10), "only")


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_resumed_equals_undisturbed_bit_for_bit(tmp_path, undisturbed, point) -> None:  # type: ignore[no-untyped-def]
    """kill -9 of rank 1 in its second checkpoint (of step 8), or at step 6; dropout and noise included."""
    uri, settings = str(tmp_path), regression.config(10)
    hit = 6 if point == "train.after_step" else 2
    died = run_ranks(regression.run, 2, uri, settings, "first", env={"RAYPROJ_FAULT": f"{point}:1:{hit}"}, check=False)
    assert died[1] == -signal.SIGKILL
    steps = [c.step for c in commits(Store(uri))]
    assert steps in ([4], [4, 8]) if point == "checkpoint.after_commit" else steps[0] == 4
    resumed = run_ranks(regression.run, 2, uri, settings, "second")
    assert {"type": "resumed", "step": steps[-1]} in resumed[0]["events"]
    assert_same(resumed, undisturbed)


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
    victim = next(f for f in newest.files if f.path.endswith("optim_states.pt"))
    data = bytearray(store.at(newest.folder).read(victim.path))
    data[len(data) // 2] ^= 1
    store.at(newest.folder).write(victim.path, bytes(data))
    found = run_ranks(regression.run, 2, store.uri, settings, "second")
    warnings = [e["text"] for e in found[0]["events"] if e["type"] == "warning"]
    assert len(warnings) == 1 and "step 8" in warnings[0] and victim.path in warnings[0]
    assert {"type": "resumed", "step": 4} in found[0]["events"]
    assert_same(found, undisturbed)


def test_the_averaged_weights_are_read_without_the_engine_at_any_world_size(tmp_path, undisturbed) -> None:  # type: ignore[no-untyped-def]
    run_ranks(regression.run, 2, str(tmp_path), regression.config(10), "only")
    merged, commit = load_ema(Store(str(tmp_path)))
    assert commit.step == 10
    flat = torch.cat([r["ema"] for r in undisturbed])
    names = list(undisturbed[0]["weights"])
    assert set(merged) == set(names)
    assert torch.equal(torch.cat([merged[n] for n in names]), flat[: sum(merged[n].numel() for n in names)])


def test_another_world_size_or_stage_is_refused_in_one_sentence(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run_ranks(regression.run, 2, str(tmp_path), regression.config(4), "first")
    with pytest.raises(AssertionError, match=r"UserError.*cluster\.ranks=2 but this run has 1"):
        run_ranks(regression.run, 1, str(tmp_path), regression.config(8), "second")


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


def test_what_to_keep() -> None:
    config = CheckpointConfig(keep_last=2, keep_every=100)
    assert expired(config, [100, 130, 120, 110, 200]) == [110, 120]
    assert expired(config, [7]) == []
    assert checkpoint.CheckpointConfig(keep_last=0).problems()
