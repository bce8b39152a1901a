"""The budget of a private dataset: against a composition by hand, two drivers at once, crashes, and what people read."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import yaml

from rayproj import cli
from rayproj.errors import UserError
from rayproj.privacy import accounting, budget
from rayproj.privacy.budget import charged, register, registrations, set_budget, show_budget
from rayproj.privacy.ledger import Ledger, next_start, secret_key, spent
from rayproj.privacy.plan import PrivacyPlan
from rayproj.storage.store import Store, to_json
from tests.support import commands, images, latents

DELTA = 1e-3
PLAN = PrivacyPlan(50, 0.2, 2.0, 1.0, steps=10, delta=DELTA, multiplicity=1, normaliser=10.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    images.write(str(tmp_path / "private"))  # 50 examples
    return Store(str(tmp_path / "private"))


def run_dir(tmp_path: Path, name: str) -> Store:
    """A run with what `show` reads of it."""
    store = Store(str(tmp_path / name))
    values = {"privacy": {"delta": DELTA}, "diffusion": {"latents": str(tmp_path / "private")}}
    store.put_once("config.yaml", yaml.safe_dump(values).encode())
    return store


def of(*segments: tuple[float, float, int]) -> float:
    return accounting.epsilon_of(segments, DELTA)


def charge(run: Store, *steps: int, plan: PrivacyPlan = PLAN) -> None:
    ledger = Ledger(run, plan, secret_key(run), next_start(run))
    for step in steps:
        ledger.charge(step)


def limit(dataset: Store, steps: int) -> None:
    """A budget of so many steps of PLAN, and a hair."""
    set_budget(dataset.uri, of((0.2, 2.0, steps)) * 1.0001, DELTA)


def test_runs_are_let_in_while_their_composition_fits(dataset: Store, tmp_path: Path) -> None:
    limit(dataset, 25)
    register(dataset, run_dir(tmp_path, "a"), PLAN)
    register(dataset, run_dir(tmp_path, "b"), PLAN)
    c = run_dir(tmp_path, "c")
    with pytest.raises(UserError, match=r"2 other runs take .* left, .* train.steps to at most 5 with"):
        register(dataset, c, PLAN)
    register(dataset, run_dir(tmp_path, "d"), replace(PLAN, steps=5))
    with pytest.raises(UserError, match=r"no step fits"):
        register(dataset, run_dir(tmp_path, "e"), replace(PLAN, steps=5))
    assert [one.accepted for one in registrations(dataset)] == [True, True, False, True, False]


def test_a_refused_run_may_come_back_when_another_has_spent_less(dataset: Store, tmp_path: Path) -> None:
    limit(dataset, 15)
    a, b = run_dir(tmp_path, "a"), run_dir(tmp_path, "b")
    register(dataset, a, PLAN)
    with pytest.raises(UserError, match="budget"):
        register(dataset, b, PLAN)
    charge(a, 0, 1, 2, 3)
    with pytest.raises(UserError, match="budget"):  # what it has not yet done is still planned
        register(dataset, b, PLAN)
    a.put_once("result.json", to_json({}))
    register(dataset, b, PLAN)
    assert [one.accepted for one in registrations(dataset)] == [True, False, False, True]


def test_a_run_that_is_resumed_is_registered_once_and_judged_by_its_ledger(dataset: Store, tmp_path: Path) -> None:
    """Two steps of ten are done twice, so they cost like one step with less noise: the filter sees that."""
    twice = of((0.2, 2.0, 8), (0.2, 2.0 / 2**0.5, 2))
    set_budget(dataset.uri, twice * 1.0001, DELTA)
    a = run_dir(tmp_path, "a")
    register(dataset, a, PLAN)
    charge(a, 0, 1)
    register(dataset, a, PLAN)  # there is no commit, so it begins anew
    charge(a, *range(3))
    with pytest.raises(UserError, match="charged steps twice"):
        register(dataset, a, PLAN)
    (one,) = registrations(dataset)
    assert one.accepted is True and one.run == a.uri


def test_a_ledger_with_repeats_counts_more_than_its_plan_for_others(dataset: Store, tmp_path: Path) -> None:
    limit(dataset, 20)
    a = run_dir(tmp_path, "a")
    register(dataset, a, PLAN)
    charge(a, 0, 1)
    charge(a, 0, 1)
    with pytest.raises(UserError, match=r"at most \d with"):
        register(dataset, run_dir(tmp_path, "b"), PLAN)


def test_a_run_whose_ledger_is_gone_counts_with_its_whole_plan(dataset: Store, tmp_path: Path) -> None:
    a = run_dir(tmp_path, "a")
    register(dataset, a, PLAN)
    charge(a, 0)
    a.put_once("result.json", to_json({}))
    assert len(charged(registrations(dataset)[0])) == 1
    a.delete_tree("")
    assert len(charged(registrations(dataset)[0])) == 10
    register(dataset, run_dir(tmp_path, "a"), PLAN)  # another run in the same place has another token
    assert [len(charged(one)) for one in registrations(dataset)] == [10, 10]


def test_a_closed_run_counts_with_its_ledger_alone_and_releases_no_more(
    dataset: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(dataset, 14)
    a, b = run_dir(tmp_path, "a"), run_dir(tmp_path, "b")
    assert cli.main(["privacy", "close", a.uri]) == 2
    assert "holds nothing of a budget" in capsys.readouterr().err
    register(dataset, a, PLAN)
    ledger = Ledger(a, PLAN, secret_key(a), next_start(a))
    for step in range(3):
        ledger.charge(step)
    with pytest.raises(UserError, match="budget"):
        register(dataset, b, PLAN)
    assert cli.main(["privacy", "close", a.uri]) == 0
    assert f"ε = {budget._up(of((0.2, 2.0, 3)))} spent of" in (text := capsys.readouterr().out) and "closed" in text
    with pytest.raises(UserError, match="may release nothing more"):  # a driver that was at it all the while
        ledger.charge(3)
    with pytest.raises(UserError, match="may release nothing more"):
        register(dataset, a, PLAN)
    # The fourth is on record, although nothing was released: 4 + 10 steps fit, and 5 + 10 would not.
    assert len(charged(registrations(dataset)[0])) == 4
    register(dataset, b, PLAN)
    b.put_once("result.json", to_json({}))
    assert cli.main(["privacy", "close", b.uri]) == 2
    assert "there is nothing to close" in capsys.readouterr().err


def test_a_run_closed_before_its_first_step_costs_nothing(dataset: Store, tmp_path: Path) -> None:
    limit(dataset, 10)
    a = run_dir(tmp_path, "a")
    register(dataset, a, PLAN)
    budget.close(a.uri)
    register(dataset, run_dir(tmp_path, "b"), PLAN)


def test_of_two_drivers_at_once_both_never_pass(dataset: Store, tmp_path: Path) -> None:
    limit(dataset, 15)
    for trial in range(12):
        dataset.delete_tree("budget/runs")
        dataset.delete_tree("budget/verdicts")
        gate = Barrier(2)

        def attempt(name: str, gate: Barrier = gate, trial: int = trial) -> bool:
            run = run_dir(tmp_path, f"{trial}/{name}")
            gate.wait()
            try:
                register(dataset, run, PLAN)
                return True
            except UserError:
                return False

        with ThreadPoolExecutor(2) as pool:
            passed = list(pool.map(attempt, "ab"))
        assert sum(passed) == 1  # the first number sees nobody before it
        assert [one.number for one in registrations(dataset)] == [0, 1]


def test_a_driver_that_died_before_its_verdict_still_counts(
    dataset: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(dataset, 15)
    a = run_dir(tmp_path, "a")

    def die(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(budget, "_judge", die)
        with pytest.raises(KeyboardInterrupt):
            register(dataset, a, PLAN)
    with pytest.raises(UserError, match="1 other run takes"):
        register(dataset, run_dir(tmp_path, "b"), PLAN)
    register(dataset, a, PLAN)
    assert [(one.run, one.accepted) for one in registrations(dataset)] == [
        (a.uri, True),
        (f"{tmp_path}/b", False),
    ]


def test_runs_before_the_budget_count_and_another_budget_is_refused(
    dataset: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(dataset, run_dir(tmp_path, "a"), PLAN)
    arguments = ["privacy", "budget", dataset.uri, "--epsilon", "1.5", "--delta", "1e-3"]
    assert cli.main(arguments) == 0 and cli.main(arguments) == 0
    assert "not finished" in capsys.readouterr().out
    assert cli.main([*arguments[:3], "--epsilon", "3", "--delta", "1e-3"]) == 2
    assert "has a budget of ε = 1.5 at δ = 0.001 already" in capsys.readouterr().err
    assert cli.main([*arguments[:3], "--epsilon", "3"]) == 2
    for epsilon, delta in ((0.0, 1e-3), (float("inf"), 1e-3), (1.0, 0.5)):
        with pytest.raises(UserError):
            set_budget(dataset.uri, epsilon, delta)
    assert of((0.2, 2.0, 30)) > 1.5
    with pytest.raises(UserError, match="1 other run takes"):
        register(dataset, run_dir(tmp_path, "b"), replace(PLAN, steps=20))


def test_what_is_shown(dataset: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit(dataset, 30)
    a, b = run_dir(tmp_path, "a"), run_dir(tmp_path, "b")
    for run in (a, b):
        register(dataset, run, PLAN)
    charge(a, *range(6))
    charge(a, *range(4, 10))
    a.put_once("result.json", to_json({}))
    assert cli.main(["privacy", "show", a.uri, b.uri]) == 0
    text = capsys.readouterr().out
    spent = of((0.2, 2.0, 8), (0.2, 2.0 / 2**0.5, 2))
    assert f"spent         ε = {budget._up(spent)} at δ = 0.001, for each example (ADD_OR_REMOVE_ONE)" in text
    assert "12 of 10 steps by 2 starts, so 2 charged twice" in text
    assert "start 1     steps 4 to 9: 6 releases" in text
    assert f"noise multiplier 2, sampling rate 0.2; plan {PLAN.digest()}" in text
    assert text.count("private data") == 3, "one for each run, and the dataset once"
    whole = of((0.2, 2.0, 18), (0.2, 2.0 / 2**0.5, 2))
    assert f"by 2 runs; {budget._up(whole)} once all have finished" in text
    assert f"run 1       ε = 0 spent of {budget._up(PLAN.epsilon())} planned, not finished: {b.uri}" in text
    assert "left          about ε = " in show_budget(dataset)
    assert cli.main(["privacy", "show", str(tmp_path / "nothing")]) == 2
    assert "There is no run" in capsys.readouterr().err


def test_the_job_is_refused_before_its_first_step(dataset: Store, tmp_path: Path) -> None:
    from rayproj import config
    from rayproj.jobs import finetune_private  # type: ignore[attr-defined]

    set_budget(dataset.uri, 0.5, DELTA)
    values = {
        "diffusion": {"latents": dataset.uri},
        "privacy": {"epsilon": 4.0, "delta": DELTA, "expected_batch": 10},
        "train": {"steps": 5, "engine": {"optimizer": {"clip_grad_norm": 0}}},
        "run": {"dir": f"{tmp_path}/run"},
        "tracking": {"wandb": "disabled"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"lower privacy\.epsilon"):
        finetune_private.main(config.load(finetune_private.Config, tmp_path / "job.yaml", []))
    assert Store(f"{tmp_path}/run").list("ledger") == []
    assert [one.accepted for one in registrations(dataset)] == [False]


def test_steps_done_again_after_a_rank_was_lost_are_charged_before_they_are_done(tmp_path: Path) -> None:
    """Six planned steps fit and so would one done again, but not the four since the last commit."""
    data = latents.write(str(tmp_path / "latents"))
    set_budget(data.uri, of((0.2, 2.0, 5), (0.2, 2.0 / 2**0.5, 1)) * 1.0001, DELTA)
    values = {
        "diffusion": {"latents": data.uri, "denoiser": latents.DENOISER},
        "privacy": {"noise_multiplier": 2.0, "delta": DELTA, "expected_batch": 10, "multiplicity": 1},
        "train": {"steps": 6, "engine": {"optimizer": {"clip_grad_norm": 0}}, "checkpoint": {"every_steps": 100}},
        "run": {"dir": f"{tmp_path}/run"},
        "cluster": {"ranks": 1},
        "tracking": {"wandb": "disabled"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    words = [sys.executable, str(commands.ROOT / "jobs" / "finetune_private.py"), str(tmp_path / "job.yaml")]
    once = {"RAYPROJ_FAULT": "train.after_step:*:4", "RAYPROJ_FAULT_ONCE": str(tmp_path / "once")}
    done = commands.run(*words, **once)
    assert done.returncode == 2, done.stderr
    assert "this run has charged steps twice" in done.stderr and "Traceback" not in done.stderr
    assert [record["step"] for record in spent(Store(f"{tmp_path}/run"))] == [0, 1, 2, 3], "none was released again"
