"""APGD: projected gradient ascent whose steps shrink by what they achieve (Croce and Hein 2020, "Reliable evaluation of
adversarial robustness", algorithm 1), and its form for ℓ1 (Croce and Hein 2021, "Mind the box", algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rayproj.robustness.losses import Loss, cross_entropy
from rayproj.robustness.oracle import Attacked, Oracle
from rayproj.robustness.pgd import steepest
from rayproj.robustness.threats import Norm, Threat, wide

RHO, MOMENTUM = 0.75, 0.75
State = dict[str, Tensor]
"""Of the examples that are still attacked: "number" in the batch, "x", "label", "target", "point" and the one "before",
"gradient" and "value" there; the best ones; and what the rule keeps of each."""


class _Rule(Protocol):
    def begin(self, state: State) -> None: ...

    def step(self, state: State, number: int) -> Tensor: ...

    def check(self, state: State, number: int) -> None: ...


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is looked at."""
    found, span = [], max(int(0.22 * steps), 1)
    at = span
    while at <= steps:
        found.append(at)
        span = max(span - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        at += span
    return found


class _Halving:
    """ℓ∞ and ℓ2: momentum, and steps that are halved."""

    def __init__(self, threat: Threat, steps: int) -> None:
        self.threat, self.checkpoints, self.last = threat, checkpoints(steps), 0

    def begin(self, state: State) -> None:
        value = state["value"]
        state["step"] = torch.full_like(value, 2 * self.threat.eps)
        state["increases"] = torch.zeros_like(value)
        state["halved"] = torch.ones_like(value, dtype=torch.bool)
        state["best_before"] = value.clone()

    def step(self, state: State, number: int) -> Tensor:
        x, point, before, gradient, step = (state[n] for n in ("x", "point", "before", "gradient", "step"))
        return self.threat.ascend(x, point, before, gradient, step, 1.0 if number == 1 else MOMENTUM)

    def check(self, state: State, number: int) -> None:
        state["increases"] += state["increased"]
        if number not in self.checkpoints:
            return
        slow = state["increases"] <= RHO * (number - self.last)
        stuck = ~state["halved"] & (state["best_before"] >= state["best_value"])
        halve = slow | stuck
        state["step"] = torch.where(halve, state["step"] / 2, state["step"])
        _restart(state, halve)
        state["halved"], state["best_before"] = halve, state["best_value"].clone()
        state["increases"], self.last = torch.zeros_like(state["increases"]), number


class _Sparse:
    """ℓ1: steps along the largest values of the gradient, as many as the best point has changed."""

    def __init__(self, threat: Threat, steps: int, warm: bool) -> None:
        self.threat, self.every, self.warm = threat, max(int(0.04 * steps), 1), warm

    def begin(self, state: State) -> None:
        value, x = state["value"], state["x"]
        state["step"] = torch.full_like(value, self.threat.eps)
        changed = _changed(state["point"], x) if self.warm else torch.full_like(value, x.shape[1:].numel())
        state["changed"], state["share"] = (
            changed,
            changed / x.shape[1:].numel() / 1.5 if self.warm else 0.2 + 0 * value,
        )

    def step(self, state: State, number: int) -> Tensor:
        direction = steepest(state["gradient"], Norm.l1, state["share"])
        return self.threat.project(state["x"], state["point"] + wide(state["step"], direction) * direction)

    def check(self, state: State, number: int) -> None:
        if number % self.every:
            return
        changed = _changed(state["best"], state["x"])
        fewer = changed / state["changed"].clamp(min=1) < 0.95
        step = torch.where(fewer, torch.full_like(state["step"], self.threat.eps), state["step"] / 1.5)
        state["step"] = step.clamp(self.threat.eps / 10, self.threat.eps)
        state["share"], state["changed"] = changed / state["x"].shape[1:].numel() / 1.5, changed
        _restart(state, fewer)


def _changed(point: Tensor, x: Tensor) -> Tensor:
    """Values of each example that differ, [B]."""
    return ((point - x).abs() > 1e-9).flatten(1).sum(1).float()


def _restart(state: State, which: Tensor) -> None:
    """From the best points."""
    at = wide(which, state["x"])
    state["point"] = torch.where(at, state["best"], state["point"])
    state["gradient"] = torch.where(at, state["best_gradient"], state["gradient"])


def apgd(
    oracle: Oracle,
    x: Tensor,
    label: Tensor,
    row: Tensor,
    threat: Threat,
    loss: Loss = cross_entropy,
    steps: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
    target: Tensor | None = None,
    go_on: bool = False,
) -> Attacked:
    """Attack each example by itself: what comes of one depends on no other.

    Args:
        x: fp32 [B, C, H, W] in [0, 1].
        label: int64 [B].
        row: int64 [B, 3]: keys of the random starts.
        start: points to begin at, in place of random ones.
        target: int64 [B], for targeted losses.
        go_on: with examples that are broken, for the points of the highest loss; else they leave the batch.
    """
    rule: _Rule = _Sparse(threat, steps, start is not None) if threat.norm is Norm.l1 else _Halving(threat, steps)
    found = Attacked(x.clone(), torch.zeros_like(label, dtype=torch.bool))
    state: State = {"number": torch.arange(len(x), device=x.device), "x": x, "label": label}
    state["target"] = label if target is None else target
    state["point"] = threat.start(x, row, seed) if start is None else threat.project(x, start)
    state["before"] = state["point"]
    value, gradient, logits = oracle.ask(state["point"], label, state["target"], loss)
    state |= {"value": value, "gradient": gradient, "best_value": value, "best_gradient": gradient}
    state["best"] = state["point"]
    rule.begin(state)
    state = _without_broken(state, logits, found, go_on)
    for number in range(1, steps + 1):
        if not len(state["number"]):
            break
        state["before"], state["point"] = state["point"], rule.step(state, number)
        value, gradient, logits = oracle.ask(state["point"], state["label"], state["target"], loss)
        state["increased"], state["value"], state["gradient"] = (value > state["value"]).float(), value, gradient
        better = value > state["best_value"]
        state["best_value"] = torch.maximum(value, state["best_value"])
        for name in ("point", "gradient"):
            best = "best" if name == "point" else "best_gradient"
            state[best] = torch.where(wide(better, x), state[name], state[best])
        state = _without_broken(state, logits, found, go_on)
        rule.check(state, number)
    found.images[state["number"]] = state["best"]
    return found


def apgd_from_afar(
    oracle: Oracle, x: Tensor, label: Tensor, row: Tensor, threat: Threat, loss: Loss = cross_entropy, steps: int = 100,
    seed: int = 0, target: Tensor | None = None, go_on: bool = False,
) -> Attacked:  # fmt: skip
    """For ℓ1: first in balls of three and two times the radius, for 30 % of the steps each, and from what is found there in
    the ball itself (Croce and Hein 2021, section 3.3); arguments as of `apgd`."""
    start, far = None, int(0.3 * steps)
    for factor in (3, 2):
        wider = Threat(threat.norm, factor * threat.eps)
        start = apgd(oracle, x, label, row, wider, loss, far, seed, start, target, go_on=True).images
    return apgd(oracle, x, label, row, threat, loss, steps - 2 * far, seed, start, target, go_on)


def strongest(norm: Norm) -> Callable[..., Attacked]:
    """The ascent that AutoAttack takes in a norm."""
    return apgd_from_afar if norm is Norm.l1 else apgd


def _without_broken(state: State, logits: Tensor, found: Attacked, go_on: bool) -> State:
    """Note the examples that are misclassified at the point just seen, and go on with the others."""
    broken = logits.argmax(1) != state["label"]
    if not broken.any():
        return state
    number = state["number"][broken]
    found.broken[number] = True
    if go_on:
        return state
    found.images[number] = state["point"][broken]
    return {name: tensor[~broken] for name, tensor in state.items()}
