"""Per-example gradients, clipped to a norm and summed.

The K views of an example are one group: the gradient of their mean loss is the example's gradient, so it costs what an
ordinary backward over K images costs. Four ways of computing the same numbers (`plan.ClippingPath`): book-keeping, which is
one backward for a chunk of examples (`bookkeeping`); the same for the norms alone, and a second pass for the sum; and for
models that it has no rule for, one backward an example, or `torch.func.vmap` over the chunk.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rayproj.engine.task import Batch
from rayproj.errors import UserError
from rayproj.privacy.bookkeeping import NoLayer, Uncovered, one_pass
from rayproj.privacy.plan import ClippingPath

Losses = Callable[[nn.Module, Batch], Tensor]
log = logging.getLogger(__name__)


def refuse_cross_example_layers(model: nn.Module) -> None:
    """Raise UserError for a layer whose output on one example depends on others: its gradient cannot be clipped alone."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _InstanceNorm) and layer.track_running_stats):
            raise UserError(
                f"The layer '{name}' ({type(layer).__name__}) mixes examples, so no example's gradient is its own; "
                "use GroupNorm in its place for private training."
            )


def _buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Identity and version of each saved tensor that is not a parameter."""
    parameters = {id(p) for p in model.parameters()}
    saved = model.state_dict(keep_vars=True).items()
    return {name: (id(t), t._version) for name, t in saved if isinstance(t, Tensor) and id(t) not in parameters}


def with_views(batch: Batch, multiplicity: int) -> Batch:
    """Every example K times in a row, told apart by the view in its row key."""
    if multiplicity == 1:
        return batch
    size = len(batch["row"])
    repeated = {name: tensor.repeat_interleave(multiplicity, dim=0) for name, tensor in batch.items()}
    repeated["row"] = repeated["row"].clone()
    repeated["row"][:, 2] = torch.arange(multiplicity, device=repeated["row"].device).repeat(size)
    return repeated


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """min(1, C / norm); zero where the norm is not finite, so that such an example contributes nothing."""
    factor = clip_norm / norm.clamp(min=clip_norm)
    return torch.where(torch.isfinite(norm), factor, torch.zeros_like(factor))


@dataclass(frozen=True)
class _Work:
    """Whose gradients are clipped, and to what: the arguments of `clipped_sum`."""

    model: nn.Module
    losses: Losses
    parameters: list[tuple[str, nn.Parameter]]
    views: int
    clip_norm: float

    @property
    def bf16(self) -> bool:
        return any(p.dtype is torch.bfloat16 for _, p in self.parameters)


Add = Callable[[_Work, Batch, Tensor], tuple[Tensor, Tensor]]
"""(work, rows, flat total to add the examples' clipped gradients to) to the examples' losses [B] and norms [B]."""


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    parameters: list[tuple[str, nn.Parameter]],
    batch: Batch,
    multiplicity: int,
    clip_norm: float,
    chunk: int = 1,
    path: ClippingPath = ClippingPath.auto,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over the examples of their clipped gradients.

    Args:
        losses: (model, batch) to per-row losses; row b depends on row b alone.
        parameters: (name, parameter) of what is trained, in the order of the flat vector.
        batch: B examples, possibly none.
        multiplicity: K, views of an example.
        chunk: examples at a time; where gradients are materialised, 1 is a backward each, more is vmap.
        path: how; all give the same numbers, to rounding.

    Returns:
        The flat sum, fp32 [number of parameters]; the examples' losses [B] and gradient norms [B] before clipping.

    Raises:
        UserError: the forward changed a buffer, which a checkpoint would release without noise.
        Uncovered: book-keeping was asked for, in one pass or two, and has no rule for something in the model.
    """
    work, before = _Work(model, losses, parameters, multiplicity, clip_norm), _buffers(model)
    if path is ClippingPath.auto:
        path, may_fall_back = _chosen(work, batch, chunk), True
    else:
        may_fall_back = False
    try:
        found = _sum(work, batch, chunk, ADD[path], may_fall_back)
    except Uncovered as error:
        raise Uncovered(
            f"privacy.path={path.value} does not cover the model: {error}. Set privacy.path=auto, which goes a slower way "
            "where it must."
        ) from error
    changed = [name for name, version in _buffers(model).items() if before.get(name) != version]
    if changed:
        raise UserError(
            f"The forward changed the buffer '{changed[0]}', and checkpoints would hold it without noise; "
            "use a layer without running statistics for private training."
        )
    return found


def _sum(work: _Work, batch: Batch, chunk: int, add: Add, may_fall_back: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    first = work.parameters[0][1]
    total = torch.zeros(sum(p.numel() for _, p in work.parameters), dtype=torch.float32, device=first.device)
    total = total.double() if first.dtype is torch.float64 else total
    all_losses, all_norms = [torch.zeros(0)], [torch.zeros(0)]
    for begin in range(0, len(batch["row"]), chunk):
        part = with_views({name: t[begin : begin + chunk] for name, t in batch.items()}, work.views)
        try:
            values, norms = add(work, part, total)
        except Uncovered:  # only in this batch: nothing was added yet
            if not may_fall_back:
                raise
            values, norms = _add_by_gradients(work, part, total)
        all_losses.append(values.detach().float().cpu())
        all_norms.append(norms.float().cpu())
    return total, torch.cat(all_losses), torch.cat(all_norms)


def _add_by_bookkeeping(work: _Work, batch: Batch, total: Tensor) -> tuple[Tensor, Tensor]:
    tape = one_pass(work.model, work.losses, work.parameters, batch, work.views)
    norms = tape.norms()
    parts = total.split([p.numel() for _, p in work.parameters])
    flat = {id(p): part for (_, p), part in zip(work.parameters, parts, strict=True)}
    tape.add_to(flat, clip_factor(norms, work.clip_norm))
    assert tape.losses is not None
    return tape.losses.unflatten(0, (-1, work.views)).mean(1), norms


def _add_by_two_passes(work: _Work, batch: Batch, total: Tensor) -> tuple[Tensor, Tensor]:
    """Norms by book-keeping, then the gradient of the losses times the clip factors (Li et al. 2022, arXiv 2110.05679,
    "ghost clipping"; Bu et al. 2022, arXiv 2205.10683, algorithm 1)."""
    if work.bf16:
        raise Uncovered("in two passes the sum over the examples would be rounded to bf16, which no bound accounts for")
    with torch.random.fork_rng([total.device] if total.is_cuda else []):  # both passes have the same dropout
        norms = one_pass(work.model, work.losses, work.parameters, batch, work.views, sums=False).norms()
    factors = clip_factor(norms, work.clip_norm)
    if not isinstance(factors, FakeTensor) and not bool((factors > 0).all()):
        return _add_by_gradients(work, batch, total)  # in a sum of losses, 0 times what is not finite would be NaN
    values = work.losses(work.model, batch)
    weighted = (values * factors.repeat_interleave(work.views).to(values.dtype)).sum() / work.views
    tensors = [p for _, p in work.parameters]
    parts = total.split([p.numel() for p in tensors])
    for part, g in zip(parts, torch.autograd.grad(weighted, tensors, allow_unused=True), strict=True):
        if g is not None:
            part += g.flatten()
    return values.unflatten(0, (-1, work.views)).mean(1), norms


def _add_by_gradients(work: _Work, batch: Batch, total: Tensor) -> tuple[Tensor, Tensor]:
    per_example = _by_loop if len(batch["row"]) == work.views else _by_vmap
    gradients, values = per_example(work.model, work.losses, work.parameters, batch, work.views)
    gradients = [g.to(total.dtype).flatten(1) for g in gradients]
    norms = torch.stack([g.square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = clip_factor(norms, work.clip_norm)
    begin_flat = 0
    for g in gradients:
        # A gradient that is not finite would make 0 * inf = NaN, so it is taken out before it is weighted.
        finite = torch.where(factors[:, None] > 0, g, torch.zeros_like(g))
        total[begin_flat : begin_flat + g.shape[1]] += factors @ finite
        begin_flat += g.shape[1]
    return values, norms


ADD: dict[ClippingPath, Add] = {
    ClippingPath.bookkeeping: _add_by_bookkeeping,
    ClippingPath.two_pass: _add_by_two_passes,
    ClippingPath.materialise: _add_by_gradients,
}
# Chance must not decide between restarts, whose numbers are to be the same bit for bit: two passes must take less than this
# part of the time of one, and one pass long enough to be measured.
FASTER, MEASURABLE = 0.7, 0.1

_choices: WeakKeyDictionary[nn.Module, dict[tuple[str, int, int, int], ClippingPath]] = WeakKeyDictionary()


def _chosen(work: _Work, batch: Batch, chunk: int) -> ClippingPath:
    """Of the paths that cover the model the fastest; found out on the first batch that is not empty, once for a model."""
    if not len(batch["row"]):
        return ClippingPath.bookkeeping
    known = _choices.setdefault(work.model, {})
    losses = getattr(work.losses, "__qualname__", type(work.losses).__qualname__)
    key = (losses, work.views, len(work.parameters), chunk)
    if key not in known:
        if isinstance(work.parameters[0][1], FakeTensor):  # memory is planned with them; they have no contents
            return ClippingPath.bookkeeping
        with _without_dropout(work.model):
            if not _is_covered(work, batch):
                known[key] = ClippingPath.materialise
            else:
                part = {name: t[:chunk] for name, t in batch.items()}
                one = _seconds(work, part, chunk, ClippingPath.bookkeeping)
                tried = one >= MEASURABLE and not work.bf16
                two = _seconds(work, part, chunk, ClippingPath.two_pass) if tried else math.inf
                known[key] = ClippingPath.two_pass if two < FASTER * one else ClippingPath.bookkeeping
                log.info("Clipping by %s; one pass took %.3g s, two %.3g s.", known[key].value, one, two)
    return known[key]


def _seconds(work: _Work, batch: Batch, chunk: int, path: ClippingPath) -> float:
    """The shorter of two runs, after one that warms up."""
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        _sum(work, batch, chunk, ADD[path])[1].sum().item()  # waits for the device
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _is_covered(work: _Work, batch: Batch) -> bool:
    """Whether book-keeping gives what a loop gives on two examples.

    A rule that takes a layer for what it is not, such as one whose first dimension is not the batch, must not decide how
    much an example is clipped.
    """
    two, reason, quiet = {name: t[:2] for name, t in batch.items()}, "", False
    try:
        free = _sum(replace(work, clip_norm=1.0), two, 1, _add_by_gradients)[2]
        # Half of the smaller norm, so that both are clipped: a rule that leaves the factors out is seen.
        clipping = replace(work, clip_norm=0.5 * min((n for n in free.tolist() if 0 < n < math.inf), default=2.0))
        found = _sum(clipping, two, 2, _add_by_bookkeeping)
        expected = _sum(clipping, two, 1, _add_by_gradients)
    except Uncovered as error:
        reason, quiet = str(error), isinstance(error, NoLayer)
    else:
        # TF32 and bf16 round otherwise in products of other shapes; a wrong rule is off by far more.
        close = 0.05 if work.bf16 else 0.01
        same = torch.allclose(found[2], expected[2], rtol=close, atol=0, equal_nan=True)
        if not same or (found[0] - expected[0]).norm() > close * (1e-6 * clipping.clip_norm + expected[0].norm()):
            reason = "it gives other gradients than a loop does"
    if reason and not quiet:
        log.warning("Clipping goes the slow way, because book-keeping does not cover the model: %s.", reason)
    return not reason


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Layers as in evaluation, because a draw of one batch is not that of another."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _by_loop(
    model: nn.Module, losses: Losses, parameters: list[tuple[str, nn.Parameter]], batch: Batch, multiplicity: int
) -> tuple[list[Tensor], Tensor]:
    """One example: its K rows make one backward."""
    assert len(batch["row"]) == multiplicity
    tensors = [p for _, p in parameters]
    loss = losses(model, batch).mean()
    # `autograd.grad`, not `backward`: DeepSpeed's hooks must never see a gradient that is not yet private.
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(p)[None] if g is None else g[None] for g, p in zip(found, tensors, strict=True)], loss[
        None
    ]


class _AsModule(nn.Module):
    """Lets `losses`, which calls the model, run on substituted parameters."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Batch) -> Tensor:
        return self.losses(self.model, batch).mean()


def _by_vmap(
    model: nn.Module, losses: Losses, parameters: list[tuple[str, nn.Parameter]], batch: Batch, multiplicity: int
) -> tuple[list[Tensor], Tensor]:
    whole = _AsModule(model, losses)
    values = {f"model.{name}": p.detach() for name, p in parameters}

    def loss_of(substituted: dict[str, Tensor], example: Batch) -> Tensor:
        return torch.func.functional_call(whole, substituted, (example,))

    grouped = {name: t.reshape(-1, multiplicity, *t.shape[1:]) for name, t in batch.items()}
    # Fused attention has no batching rule and would fall back to one call an example.
    with sdpa_kernel(SDPBackend.MATH):
        gradients, found = torch.func.vmap(
            torch.func.grad_and_value(loss_of), in_dims=(None, 0), randomness="different"
        )(values, grouped)
    return [gradients[f"model.{name}"] for name, _ in parameters], found
