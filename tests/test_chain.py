"""The file of a chain: what it must say, and what becomes of it. `tests/jobs/test_chain.py` runs the demo's."""

import subprocess
import sys
from pathlib import Path

import pytest

from rayproj import chain
from rayproj.errors import UserError
from rayproj.jobs import train_classifier  # type: ignore[attr-defined]
from tests.support.commands import ROOT, run

FILE = """
root: somewhere
stages:
- {first: train_classifier}
- {second: train_classifier, third: generate}
first: {data: "${root}/data", run: {dir: "${root}/first"}}
second: {data: x, run: {dir: y}}
third: {generate: {model: m, out: o}, run: {dir: z}}
"""


def test_stages_are_jobs_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(FILE)
    config = chain.load(tmp_path / "mine.yaml", ["root=elsewhere", "second.train.steps=7"])
    stages = chain.stages_of(config)
    assert [len(together) for together in stages] == [1, 2]
    main, first = stages[0][0]
    assert main is train_classifier.main and isinstance(first, train_classifier.Config)
    assert first.data == "elsewhere/data" and stages[1][0][1].train.steps == 7


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("root: x", [], "it needs 'stages:' with lines like '- {NAME: JOB}'"),
        ("stages: [{a: 3}]", [], "it needs 'stages:'"),
        ("stages: [a, b]", [], "it needs 'stages:'"),
        ("stages: foo", [], "it needs 'stages:'"),
        ("stages: {a: generate}", [], "it needs 'stages:'"),
        ("stages: [null]", [], "it needs 'stages:'"),
        ("stages: [{}]", [], "it needs 'stages:'"),
        ("stages: [{1: generate}]", [], "The stage '1' of"),
        ("stages: [{my-stage: generate}]", [], "must have another name: letters, digits and _, used once"),
        ("stages: [{root: generate}]", [], "The stage 'root' of"),
        ("stages: [{a: generate}, {a: generate}]", [], "The stage 'a' of"),
        ("stages: [{a: train_it}]", [], "of no job 'train_it'; give one of audit_privacy, "),
        ("stages: [{a: benchmark}]", [], "of no job 'benchmark'"),
        (FILE, ["stages=[]"], "copy the file and change them there"),
        (FILE, ["first.trian.steps=3"], "did you mean 'first.train'"),
        (FILE, ["fourth.x=3"], "there is no 'fourth"),
    ],
)
def test_what_is_no_chain_is_refused(text: str, overrides: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r".") as refused:
        chain.load(tmp_path / "mine.yaml", overrides)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["demo", "privacy_study"])
def test_chains_that_ship_have_a_folder_of_its_own_for_each_stage(name: str) -> None:
    config = chain.load(ROOT / "configs" / f"{name}.yaml", [])
    names = [stage for together in config.stages for stage in together]
    assert [getattr(config, stage).run.dir for stage in names] == [f"runs/{name}/{stage}" for stage in names]


TOGETHER = """
import threading
from rayproj import chain

begin = threading.Barrier(2)

def job(name):
    begin.wait()
    exec(f"from transformers import ViTConfig; from diffusers import {name}")
    return {"name": name}

print(chain.run([[(job, "DDIMScheduler"), (job, "DDPMScheduler")]]))
"""


def test_stages_of_one_line_may_import_the_same_libraries() -> None:
    """A race, which without the precaution is nearly always lost."""
    done = subprocess.run([sys.executable, "-c", TOGETHER], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, "{'name': 'DDPMScheduler'}"), done.stderr[-2000:]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = run("rayproj", "chain", str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "does not exist; check the path" in done.stderr
