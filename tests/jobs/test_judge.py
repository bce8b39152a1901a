"""The whole of jobs/judge.py, killed in the middle of its work: the report is that of an undisturbed run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rayproj.data.dataset import Dataset
from tests.judging.test_judge import PROMPTS, SECRET, write
from tests.support.commands import ROOT, environment, job, kill
from tests.support.studies import simulate

pytestmark = pytest.mark.xdist_group("clusters")


def write_config(folder: Path) -> Path:
    """Two models, real images and attempts, and everything else that the report can have but attributes."""
    texts = [prompt for prompt in PROMPTS for _ in range(4)]
    wrong = texts[5:] + texts[:5]
    real = write(f"{folder}/real", texts * 2, texts * 2, "caption", None)
    models = {
        "asked": write(f"{folder}/asked", texts, texts, "prompt", 3.0, SECRET),
        "other": write(f"{folder}/other", texts, wrong, "prompt", 1.0),
    }
    (folder / "key").write_bytes(SECRET)
    (folder / "study").mkdir()
    _, study = simulate(folder / "study", strengths={"asked": 0.8, "other": -0.8}, prompts=PROMPTS, ratings=60)
    judge = {
        "models": models,
        "reference": real,
        "learned_from": real,
        "attempts": {"attempt": write(f"{folder}/attempt", PROMPTS, PROMPTS, "prompt", 3.0)},
        "alignment": {"known": real},
        "adversarial": "configs/prompts/adversarial.csv",
        "watermark_key": f"{folder}/key",
        "human": study.uri,
        "feature_size": 32,
        "batch": 8,
    }
    (folder / "judge.yaml").write_text(yaml.safe_dump({"judge": judge, "pool": {"actors": 1}}))
    return folder / "judge.yaml"


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_killed_judge_goes_on_to_the_same_report(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))

    def words(name: str) -> list[str]:
        return [f"judge.out={tmp_path}/{name}", f"run.dir={tmp_path}/{name}_run"]

    undisturbed = job("judge", config, *words("undisturbed"))
    assert undisturbed.returncode == 0, undisturbed.stderr

    command = [sys.executable, "jobs/judge.py", config, *words("killed")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    scores, deadline = tmp_path / "killed" / "scores", time.monotonic() + 200
    while not list(scores.glob("asked/shards/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("**/shards/*.tar")}
    assert made and not (tmp_path / "killed" / "judged.json").exists(), "it was to be killed in the middle"
    assert not (scores / "reference").exists(), "and there was work left"

    def same_report() -> None:
        again = job("judge", config, *words("killed"))
        assert again.returncode == 0, again.stderr
        for file in ("judged.json", "judged.html"):
            assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()

    same_report()
    # As if it had been killed after the scores, before the page and the run's result.
    (tmp_path / "killed" / "judged.html").unlink()
    (tmp_path / "killed_run" / "result.json").unlink()
    same_report()
    for name in ("asked", "other", "attempt", "reference"):
        hashes = {
            Dataset.open(f"{tmp_path}/{which}/scores/{name}").manifest_hash() for which in ("killed", "undisturbed")
        }
        assert len(hashes) == 1, name
    kept = {path: at for path, at in made.items() if path.exists()}
    assert len(kept) >= len(made) - 1, "all but the one whose commit the kill may have met"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was there was not made again"
