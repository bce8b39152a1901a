"""What lies below a folder: what is damaged is named, and only what no commit holds is deleted."""

import shutil
import time
from pathlib import Path

import pytest

from rayproj import cli, maintenance
from rayproj import config as configuration
from rayproj.engine.checkpoint import CheckpointConfig, commits
from rayproj.errors import UserError
from rayproj.runtime.run import RunConfig
from rayproj.storage.store import Store
from tests.support import images, regression
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, which has two checkpoints, and a dataset."""
    root = tmp_path_factory.mktemp("root")
    settings = regression.config(8)
    run_ranks(regression.run, 2, str(root / "deep" / "run"), settings, "only")
    text = configuration.to_yaml({"run": RunConfig(dir="x"), "train": settings})
    (root / "deep" / "run" / "config.yaml").write_text(text)
    images.write(str(root / "data"))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def test_what_is_sound_is_said_with_its_size(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[-1] for line in lines] == [
        "deep/run/checkpoints/step-00000004",
        "deep/run/checkpoints/step-00000008",
        "data",
    ]
    assert all(line.startswith("ok ") for line in lines)
    for place in ("deep/run", "data"):  # a run or a dataset itself will do
        assert list(maintenance.verify(str(root / place)))
    for one in maintenance.verify(str(root)):
        folder = root / one.what
        heavy = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".tar") or p.name == "state.json"]
        assert one.files == len(heavy) and one.size == sum(p.stat().st_size for p in heavy)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize("suffix", ["ema/part-00001.safetensors", ".tar"])
def test_what_is_damaged_is_named(root: Path, capsys: pytest.CaptureFixture[str], damage: str, suffix: str) -> None:
    victim = sorted(p for p in root.rglob("*") if str(p).endswith(suffix))[0]
    data = victim.read_bytes()
    victim.unlink()
    if damage != "gone":
        victim.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert cli.main(["verify", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("BAD") for line in lines) == 1
    assert sum(victim.name in line and ("is missing" in line) == (damage == "gone") for line in lines) == 1


def test_a_record_that_cannot_be_read_is_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = root / "deep" / "run" / "checkpoints" / "step-00000008" / "COMMIT.json"
    record.write_bytes(record.read_bytes()[:100])
    assert cli.main(["verify", str(root)]) == 1
    assert f"{record} cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["dataset.json", "commits/000001.json"])
@pytest.mark.parametrize("content", [b"", b'{"shard": 1', b"[]", b"\xff"])
def test_so_is_one_of_a_dataset(root: Path, capsys: pytest.CaptureFixture[str], victim: str, content: bytes) -> None:
    record = root / "data" / victim
    record.write_bytes(content)
    assert cli.main(["verify", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("ok " in line for line in lines) == 2 and sum("BAD  data:" in line for line in lines) == 1
    assert sum(f"'{record}' is damaged and cannot be read" in line for line in lines) == 1
    if victim != "dataset.json":
        assert "BAD  data: 3 files" in "\n".join(lines), "the others' files are read nevertheless"
    assert cli.main(["dataset", "show", str(root / "data")]) == 2
    assert f"error: '{record}' is damaged and cannot be read" in capsys.readouterr().err


def test_nothing_to_verify_or_to_delete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor a dataset"):
        list(maintenance.verify(str(tmp_path)))
    with pytest.raises(UserError, match="There is nothing below"):
        maintenance.garbage(str(tmp_path), time.time())


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def litter(root: Path) -> set[str]:
    """What killed processes leave: an attempt, half of a deletion, a shard, a staged file, a damaged checkpoint."""
    checkpoints = root / "deep" / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000002")
    (checkpoints / "step-00000002" / "COMMIT.json").unlink()
    newest = commits(Store(str(root / "deep" / "run")))[-1]
    shutil.copytree(root / "deep" / "run" / newest.folder, checkpoints / "step-00000008" / "a-other")
    (checkpoints / "step-00000004" / "COMMIT.json").rename(checkpoints / "step-00000004" / "DAMAGED.json")
    shard = sorted((root / "data" / "shards").iterdir())[0]
    shutil.copy(shard, shard.with_name("000000-ffffffff.tar"))
    (root / "data" / "commits" / ".000000.json.0123.tmp").write_bytes(b"{")
    return {
        "deep/run/checkpoints/step-00000002/a-only",
        "deep/run/checkpoints/step-00000004/a-only",
        "deep/run/checkpoints/step-00000004/DAMAGED.json",
        "deep/run/checkpoints/step-00000008/a-other",
        "data/shards/000000-ffffffff.tar",
        "data/commits/.000000.json.0123.tmp",
    }


def test_what_no_record_holds_is_deleted_once_it_is_old(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(root)
    left = litter(root)
    littered = snapshot(root)
    assert maintenance.garbage(str(root), time.time()) == []
    found = maintenance.garbage(str(root), time.time() + 25 * 3600)
    assert {one.path for one in found} == left
    for one in found:
        files = [data for path, data in littered.items() if path == one.path or path.startswith(f"{one.path}/")]
        assert one.size == sum(map(len, files))
    assert cli.main(["gc", str(root), "--older-than", "0", "--dry-run"]) == 0
    assert "would be deleted" in capsys.readouterr().out and snapshot(root) == littered
    assert cli.main(["gc", str(root), "--older-than", "0"]) == 0
    kept = {path: data for path, data in before.items() if not path.startswith("deep/run/checkpoints/step-00000004")}
    assert snapshot(root) == kept
    assert cli.main(["verify", str(root)]) == 0


def test_a_damaged_checkpoint_stays_while_there_is_no_newer_one(root: Path) -> None:
    for step in (4, 8):
        place = root / "deep" / "run" / "checkpoints" / f"step-{step:08d}"
        (place / "COMMIT.json").rename(place / "DAMAGED.json")
    assert maintenance.garbage(str(root), time.time() + 1e9) == []


def test_what_a_killed_run_did_not_come_to_delete_is_deleted_by_its_own_policy(root: Path) -> None:
    config = root / "deep" / "run" / "config.yaml"
    assert CheckpointConfig().keep_last == 2 and "keep_last: 2" in config.read_text()
    config.write_text(config.read_text().replace("keep_last: 2", "keep_last: 1"))
    found = maintenance.garbage(str(root), time.time() + 1e9)
    assert [one.path for one in found] == ["deep/run/checkpoints/step-00000004"]
    maintenance.collect(str(root), found)
    assert [commit.step for commit in commits(Store(str(root / "deep" / "run")))] == [8]
