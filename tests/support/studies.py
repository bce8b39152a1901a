"""Studies without images: their plans, and ratings by raters whose preferences are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rayproj.preferences.plan import Plan, Question, Task
from rayproj.preferences.ratings import Rating
from rayproj.preferences.study import SetConfig, StudyConfig, plan
from rayproj.storage.store import Store, to_json

STRENGTHS = {"a": 0.8, "b": 0.0, "c": -0.8}


def study(
    tmp_path: Path, prompts: Sequence[str] = ("a horse", "", " a  cat ", "a dog"), **changes: object
) -> StudyConfig:
    rows = "".join(f"p{i},c{i % 2},dots,{i}\n" for i in range(7))
    (tmp_path / "p.csv").write_text("prompt,category,object,number\n" + rows)
    (tmp_path / "q.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    sets = {
        "p": SetConfig(str(tmp_path / "p.csv"), [Question.overall, Question.appeal, Question.count]),
        "q": SetConfig(str(tmp_path / "q.txt"), [Question.alignment]),
    }
    given = {"models": {n: f"data/{n}" for n in "abc"}, "sets": sets, "ratings": 20, "per_rater": 60, "share": 0.25}
    return StudyConfig(**{**given, "block": 6, **changes})  # type: ignore[arg-type]


def made(tmp_path: Path, seed: int = 0, **changes: Any) -> Plan:
    config = study(tmp_path, **changes)
    return plan(config, {name: name * 8 for name in config.models}, seed)


def rated(task: Task, rng: np.random.Generator, strengths: Mapping[str, float] = STRENGTHS) -> str | int:
    """As a Bradley–Terry rater who is indifferent now and then; of a 9 of 10 images are counted right, of c 5."""
    if task.question is Question.count:
        right = rng.uniform() < 0.7 + strengths[task.models[0]] / 4
        return (task.prompt.number or 0) + (not right)
    if rng.uniform() < 0.1:
        return "indifferent"
    left, right = (strengths[name] for name in task.models)
    return "left" if rng.uniform() < 1 / (1 + np.exp(right - left)) else "right"


def keep(store: Store, rating: Rating) -> None:
    """As `ratings.put`, but without waiting for the disk."""
    path = Path(store.uri) / rating.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_json(asdict(rating)))


def simulate(
    folder: Path, raters: int = 24, seed: int = 0, strengths: Mapping[str, float] = STRENGTHS, **changes: Any
) -> tuple[Plan, Store]:
    """A study whose slots were dealt out to raters; one more is inattentive and wrong."""
    given = {"models": {name: name for name in strengths}, "ratings": 150, "per_rater": 150}  # a rater has 75 or so
    of, store, rng = made(folder, **{**given, **changes}), Store(f"{folder}/run{seed}"), np.random.default_rng(seed)
    store.put_once("study.json", to_json(of.to_dict()))
    for slot in range(of.slots):
        rater = f"r{rng.integers(raters):04d}"
        keep(store, Rating(rater, False, slot, rated(of.task(slot), rng, strengths), 2.0, float(slot)))
        if slot % 40 == 0:
            wrong = 1 if of.task(slot).question is Question.count else "left"
            keep(store, Rating("r9999", False, slot, wrong, 0.1, -1.0))
    for number in range(3):
        wanted = of.check("r9999", number).check
        keep(store, Rating("r9999", True, number, 0 if isinstance(wanted, int) else "indifferent", 0.1, 0.0))
    return of, store
