"""The privacy budget of a dataset: what all private runs on it may spend together.

    budget/plan.json               ε at δ, created once
    budget/runs/00000002.json      the third registration: a run's folder and its planned mechanism
    budget/verdicts/00000002.json  whether that run may train, created once

lie in the store of the private dataset, and `budget.json` in the run's own names its registration.

A run registers before its first step, and is judged afterwards: it may train if all that the others have spent or plan to,
and its own plan, compose to no more than the budget. Numbers have no gaps and nothing is deleted, so of two that register
at once the later sees the earlier, and counts it unless it was refused. A run that dies between the two counts for the
others, and is judged when it is resumed.

A run is judged by its driver, before it has ranks, and by rank 0 at every start of them: steps that are done again after
ranks were lost are charged again.

A run that nobody will go on with is closed: from then on its ledger alone counts.

What this does not do. The composition takes plans as given: where they are chosen after looking at what earlier runs
released, a privacy filter is wanted (Rogers et al. 2016, arXiv 1605.08294), which for Rényi DP costs nothing more (Feldman
and Zrnic 2021, arXiv 2008.11193), and for the loss distributions used here is not claimed. Other copies of the same private
data, such as the latents of another autoencoder, have budgets of their own.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from rayproj import faults
from rayproj.data.dataset import Dataset
from rayproj.engine.checkpoint import commits
from rayproj.errors import UserError
from rayproj.privacy.accounting import epsilon_of
from rayproj.privacy.certificate import ledger_digest
from rayproj.privacy.ledger import CLOSED, epsilon_spent, mechanisms, refuse_closed, spent
from rayproj.privacy.plan import PrivacyPlan
from rayproj.storage.retry import StoreUnavailable
from rayproj.storage.store import Store, from_json, to_json

PLAN, RUNS, VERDICTS = "budget/plan.json", "budget/runs", "budget/verdicts"
TOKEN = "budget.json"

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Budget:
    epsilon: float
    delta: float

    def __str__(self) -> str:
        return f"ε = {self.epsilon:g} at δ = {self.delta:g}"


@dataclass(frozen=True)
class Registration:
    """A run on a private dataset, and the mechanism that it has planned.

    Attributes:
        number: of the registration, from 0 without gaps.
        token: of the run: another run in the same folder has another.
        run: URI of its folder.
        at: unix seconds.
        accepted: None while it is not judged.
    """

    number: int
    token: str
    run: str
    sample_rate: float
    noise_multiplier: float
    steps: int
    overflow: float
    delta: float
    plan: str
    at: float
    accepted: bool | None = None


def budget_of(dataset: Store) -> Budget | None:
    """The budget of a dataset, if it has one."""
    return Budget(**from_json(dataset.read(PLAN))) if dataset.exists(PLAN) else None


def set_budget(uri: str, epsilon: float, delta: float) -> Budget:
    """Give a private dataset its budget, for ever.

    Raises:
        UserError: there is no such dataset, it has another budget, or the numbers mean nothing.
    """
    dataset = Dataset.open(uri)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise UserError(f"A budget of ε = {epsilon:g} means nothing; give a positive number.")
    if not 0 < delta < 1 / dataset.header.num_samples:
        raise UserError(
            f"δ = {delta:g} does not lie between 0 and 1/{dataset.header.num_samples}, so it would allow the release of one "
            f"example outright; use at most {0.1 / dataset.header.num_samples:.1g}."
        )
    found = Budget(epsilon, delta)
    if not _put(dataset.store, PLAN, {"epsilon": epsilon, "delta": delta}):
        there = budget_of(dataset.store)
        if there != found:
            raise UserError(
                f"{dataset.uri} has a budget of {there} already, by which runs were let in, so it is never changed; "
                "give the same numbers, or none to see what is left of it."
            )
    return found


def registrations(dataset: Store) -> list[Registration]:
    """Every registration on a dataset, by number."""
    judged = {path.rpartition("/")[2] for path in dataset.list(VERDICTS)}
    found = []
    for path in dataset.list(RUNS):
        name = path.rpartition("/")[2]
        one = Registration(number=int(name.removesuffix(".json")), **from_json(dataset.read(path)))
        accepted = from_json(dataset.read(f"{VERDICTS}/{name}"))["accepted"] if name in judged else None
        found.append(replace(one, accepted=accepted))
    return found


def register(dataset: Store, run: Store, plan: PrivacyPlan) -> None:
    """Make a run known to its private dataset, and look whether the dataset's budget allows it, before the first step.

    A run that is resumed is the same registration. It is judged again by its ledger, since a step that was charged twice
    is no part of the plan.

    Raises:
        UserError: the run would exceed the budget or was closed, or the dataset's store cannot be written.
    """
    refuse_closed(run)
    token = _token(run, dataset)
    faults.maybe("budget.after_token")
    mine = _mine(dataset, token) or _append(dataset, run, token, plan)
    faults.maybe("budget.after_registration")
    budget, every = budget_of(dataset), registrations(dataset)
    if budget is None:
        _judge(dataset, mine, True)
        return
    records = spent(run)
    own = _tagged(mine, _ahead(mine, records, run))
    others = [one for one in _distinct(every) if one.token != token and _counts(one, mine)]
    theirs = [record for one in others for record in _tagged(one, charged(one))]
    total = epsilon_spent([*theirs, *own], budget.delta)
    if total <= budget.epsilon:
        accepted = _judge(dataset, mine, True)
        faults.maybe("budget.after_verdict")
        if not accepted:
            register(dataset, run, plan)  # another driver of this run was faster, and refused it
        return
    if not records:
        _judge(dataset, mine, False)
    raise UserError(_refusal(dataset, budget, plan, theirs, own, len(others), total, resumed=bool(records)))


def charged(one: Registration) -> Records:
    """Records of what a run has released or may release yet: its ledger alone once it is done or closed; else also the
    planned steps that are not in it; and its whole plan where its ledger cannot be read."""
    ledger = ledger_of(one)
    if ledger is None:
        return _planned(one, range(one.steps), "")
    records, ended = ledger
    if ended == "closed" or (ended and records):
        return records
    done = {record["step"] for record in records}
    return records + _planned(one, (step for step in range(one.steps) if step not in done), _key(records))


def ledger_of(one: Registration) -> tuple[Records, str] | None:
    """The ledger of a registered run, and "done", "closed", or "" while it may go on; None where it cannot be read from
    here, or its folder is not there any more or is another run's."""
    try:
        run = Store(one.run)
        if not run.exists(TOKEN) or from_json(run.read(TOKEN))["token"] != one.token:
            return None
        # Looked at first: from then on nothing is added to the ledger that was released.
        ended = "done" if run.exists("result.json") else "closed" if run.exists(CLOSED) else ""
        return spent(run), ended
    except (OSError, UserError, StoreUnavailable):
        return None


def close(uri: str) -> Store:
    """Give back what a run has planned and will not do. It can never release more; what it has released stays spent.

    Returns:
        The store of its private dataset.

    Raises:
        UserError: the folder is of no run that has registered with a dataset, or of one that is done.
    """
    run = Store(uri)
    if not run.exists(TOKEN):
        raise UserError(
            f"'{uri}' is no private run that has registered with its dataset, so it holds nothing of a budget; 'rayproj "
            "privacy budget DATASET' lists those that do. (Of one whose folder is gone, all that it planned stays spent.)"
        )
    if run.exists("result.json"):
        raise UserError(
            f"'{uri}' is done, so it holds no more of the budget than it has spent; there is nothing to close."
        )
    run.put_once(CLOSED, to_json({"at": time.time()}))
    return Store(from_json(run.read(TOKEN))["dataset"])


def _token(run: Store, dataset: Store) -> str:
    """Names a run, whatever its folder is called on another machine."""
    run.put_once(TOKEN, to_json({"token": uuid.uuid4().hex, "dataset": dataset.uri}))
    return str(from_json(run.read(TOKEN))["token"])


def _mine(dataset: Store, token: str) -> Registration | None:
    """The registration of a run, but none that was refused: it may come back when others have spent less than planned."""
    return next((one for one in registrations(dataset) if one.token == token and one.accepted is not False), None)


def _append(dataset: Store, run: Store, token: str, plan: PrivacyPlan) -> Registration:
    number = len(dataset.list(RUNS))
    values: dict[str, Any] = {
        "token": token,
        "run": run.uri,
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.steps,
        "overflow": plan.overflow,
        "delta": plan.delta,
        "plan": plan.digest(),
        "at": time.time(),
    }
    while not _put(dataset, f"{RUNS}/{number:08d}.json", values):
        number += 1
    return Registration(number=number, **values)


def _judge(dataset: Store, one: Registration, accepted: bool) -> bool:
    """Record whether a run may train. Returns False if it is recorded otherwise."""
    path = f"{VERDICTS}/{one.number:08d}.json"
    if _put(dataset, path, {"accepted": accepted, "run": one.run}):
        return True
    return bool(from_json(dataset.read(path))["accepted"]) is accepted


def _put(dataset: Store, path: str, value: dict[str, Any]) -> bool:
    try:
        return dataset.put_once(path, to_json(value))
    except PermissionError as error:
        raise UserError(
            f"What is spent of the private dataset is kept beside it, and {dataset.uri}/{path} cannot be written; "
            "allow it, or use a copy of the dataset that you may write to."
        ) from error


def _counts(one: Registration, mine: Registration) -> bool:
    """Whether a run is to be counted by another: if it may train, or may yet be allowed to and came before."""
    return one.accepted is True or (one.accepted is None and one.number < mine.number)


def _distinct(every: list[Registration]) -> list[Registration]:
    """Without the refused, and each run once, though two drivers of it may have registered it at once."""
    first: dict[str, Registration] = {}
    for one in every:
        if one.accepted is not False:
            kept = first.setdefault(one.token, one)
            if one.accepted and not kept.accepted:
                first[one.token] = one
    return list(first.values())


def _key(records: Records) -> str:
    return str(records[-1]["key"]) if records else ""


def _planned(one: Registration, steps: Iterable[int], key: str) -> Records:
    """What the ledger will say of steps."""
    mechanism = {
        "sample_rate": one.sample_rate,
        "noise_multiplier": one.noise_multiplier,
        "overflow": one.overflow,
        "key": key,
    }
    return [{"step": step, **mechanism} for step in steps]


def _ahead(one: Registration, records: Records, run: Store) -> Records:
    """What a run that is about to start will have released: its ledger, and from its last commit on all steps, some of them
    once more."""
    done = commits(run) if records else []
    begin = done[-1].step if done else 0
    return records + _planned(one, range(begin, one.steps), _key(records))


def _tagged(one: Registration, records: Records) -> Records:
    """With keys that no other run's records have: a step of one run is never a step of another."""
    return [{**record, "key": f"{one.token} {record['key']}"} for record in records]


def _refusal(
    dataset: Store,
    budget: Budget,
    plan: PrivacyPlan,
    theirs: Records,
    own: Records,
    runs: int,
    total: float,
    resumed: bool,
) -> str:
    """One sentence: what there is, what is left, and what to lower."""
    taken = epsilon_spent(theirs, budget.delta)
    known = (
        f"The private dataset {dataset.uri} has a budget of {budget}, of which {runs} other "
        f"{'run takes' if runs == 1 else 'runs take'} {_up(taken)}, so that about {max(0.0, budget.epsilon - taken):.3g} is "
        f"left, and with this run, whose ε is {_up(epsilon_spent(own, budget.delta))}, it would be {_up(total)}"
    )
    if resumed:
        return (
            f"{known}; this run has charged steps twice, so it cannot go on as planned: use its last commit as it is, or "
            "begin a shorter one in another run.dir."
        )
    most = _most_steps(plan, theirs, budget)
    if most:
        return (
            f"{known}; lower privacy.epsilon, or train.steps to at most {most} with "
            f"privacy.noise_multiplier={plan.noise_multiplier:.6g} and no privacy.epsilon."
        )
    return f"{known}; lower privacy.epsilon or privacy.expected_batch, or raise privacy.noise_multiplier: no step fits."


def _up(epsilon: float) -> str:
    """Three decimals, never rounded down."""
    return f"{math.ceil(1000 * epsilon) / 1000:g}" if math.isfinite(epsilon) else "∞"


def _most_steps(plan: PrivacyPlan, theirs: Records, budget: Budget) -> int:
    """How many steps of a plan the budget has room for."""
    segments, overflow = mechanisms(theirs), _overflow(theirs)

    def fits(steps: int) -> bool:
        whole = [*segments, (plan.sample_rate, plan.noise_multiplier, steps)]
        return epsilon_of(whole, budget.delta, overflow + steps * plan.overflow) <= budget.epsilon

    low, high = 0, plan.steps  # all of them do not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _overflow(records: Records) -> float:
    return float(sum({(r["step"], r["key"]): r["overflow"] for r in records}.values()))


def show_runs(uris: list[str]) -> str:
    """What private runs have spent, and what is left of the budgets of their datasets, for a person.

    Raises:
        UserError: a folder is of no private run.
    """
    shown, datasets = [], dict[str, Store]()
    for uri in uris:
        text, dataset = _show_run(Store(uri))
        shown.append(text)
        if dataset is not None:
            datasets.setdefault(dataset.uri, dataset)
    return "\n\n".join([*shown, *map(show_budget, datasets.values())])


def _show_run(run: Store) -> tuple[str, Store | None]:
    if not run.exists("config.yaml"):
        raise UserError(f"There is no run at '{run.uri}'; 'rayproj status FOLDER' lists those below a folder.")
    values: Any = OmegaConf.to_container(OmegaConf.create(run.read("config.yaml").decode()))
    if "privacy" not in values:
        raise UserError(
            f"The run '{run.uri}' is not private, so it spends nothing; give one of jobs/finetune_private.py."
        )
    delta, records = float(values["privacy"]["delta"]), spent(run)
    finished = run.exists("result.json")
    draws = Counter((record["step"], record["key"]) for record in records)
    starts = Counter(record["start"] for record in records)
    again = sum(count - 1 for count in draws.values())
    lines = [
        ("run", f"{run.uri} ({'done' if finished else 'closed' if run.exists(CLOSED) else 'not finished'})"),
        (
            "spent",
            f"ε = {_up(epsilon_spent(records, delta))} at δ = {delta:g}, for each example ({PrivacyPlan.relation})",
        ),
        (
            "releases",
            f"{len(records):,} of {len(draws):,} steps by {_many(len(starts), 'start')}, so {again:,} charged twice",
        ),
    ]
    for start, count in sorted(starts.items()):
        if len(starts) > 1:
            steps = [record["step"] for record in records if record["start"] == start]
            lines.append((f"  start {start}", f"steps {min(steps)} to {max(steps)}: {_many(count, 'release')}"))
    used = dict.fromkeys((r["sample_rate"], r["noise_multiplier"], r["plan"]) for r in records)
    for rate, sigma, digest in used:
        lines.append(("mechanism", f"noise multiplier {sigma:.4g}, sampling rate {rate:.4g}; plan {digest}"))
    if records:
        lines.append(("ledger", f"sha256 {ledger_digest(records)}"))
    place = (
        from_json(run.read(TOKEN))["dataset"] if run.exists(TOKEN) else (values.get("diffusion") or {}).get("latents")
    )
    if place:
        lines.append(("private data", place))
    dataset = Store(place) if place and Store(place).exists("dataset.json") else None
    return _table(lines), dataset


def show_budget(dataset: Store) -> str:
    """What all runs have spent of a private dataset, and what is left of its budget."""
    budget, every = budget_of(dataset), registrations(dataset)
    lines = [("private data", dataset.uri), ("budget", str(budget) if budget else "none")]
    rows = []
    # Without a budget there is no δ for all; that of the strictest run then serves.
    delta = budget.delta if budget else min((one.delta for one in every), default=0.0)
    spent_by_all, taken_by_all = Records(), Records()
    counted = {one.number for one in _distinct(every)}
    for one in every:
        ledger = ledger_of(one)
        there = charged(one)
        if one.number in counted:
            taken_by_all += _tagged(one, there)
            spent_by_all += _tagged(one, there if ledger is None else ledger[0])
        planned = _up(epsilon_spent(_planned(one, range(one.steps), ""), delta))
        if one.accepted is False:
            state, used = "refused", "0"
        elif ledger is None:
            state, used = "not to be read from here, so taken to be spent", planned
        else:
            state = ledger[1] or ("not finished" if ledger[0] or one.accepted else "not judged yet")
            used = _up(epsilon_spent(ledger[0], delta))
        rows.append((f"  run {one.number}", f"ε = {used} spent of {planned} planned, {state}: {one.run}"))
    if every:
        spent_, taken = epsilon_spent(spent_by_all, delta), epsilon_spent(taken_by_all, delta)
        text = f"ε = {_up(spent_)} at δ = {delta:g} by {_many(len(counted), 'run')}"
        lines.append(("spent", text + (f"; {_up(taken)} once all have finished" if taken > spent_ else "")))
        if budget:
            lines.append(("left", f"about ε = {max(0.0, budget.epsilon - taken):.3g} for other runs"))
    elif budget:
        lines.append(("left", "all of it"))
    return _table([*lines, *rows])


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _table(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<14}{value}" for name, value in lines)
