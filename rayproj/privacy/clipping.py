"""Per-example gradients, clipped to a norm and summed.

The K views of an example are one group: the gradient of their mean loss is the example's gradient, so it costs what an
ordinary backward over K images costs. Three ways of computing the same numbers: book-keeping, which is one backward for a
chunk of examples (`bookkeeping`); and for models that it has no rule for, one backward an example, or `torch.func.vmap`
over the chunk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
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

Losses = Callable[[nn.Module, Batch], Tensor]
log = logging.getLogger(__name__)


class Path(Enum):
    """How the examples' gradients are found."""

    auto = "auto"  # book-keeping where it covers the model and, tried on two examples, gives what a loop gives
    bookkeeping = "bookkeeping"
    materialise = "materialise"  # by a loop or, if chunk > 1, by vmap


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


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    parameters: list[tuple[str, nn.Parameter]],
    batch: Batch,
    multiplicity: int,
    clip_norm: float,
    chunk: int = 1,
    path: Path = Path.auto,
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
        Uncovered: book-keeping was asked for, and has no rule for something in the model.
    """
    size, before = len(batch["row"]), _buffers(model)
    first = parameters[0][1]
    total = torch.zeros(sum(p.numel() for _, p in parameters), dtype=torch.float32, device=first.device)
    total = total.double() if first.dtype is torch.float64 else total
    all_losses, all_norms = [torch.zeros(0)], [torch.zeros(0)]
    add = _add_by_bookkeeping
    if path is Path.materialise or (
        path is Path.auto and size and not _is_covered(model, losses, parameters, batch, multiplicity)
    ):
        add = _add_by_gradients
    for begin in range(0, size, chunk):
        part = with_views({name: t[begin : begin + chunk] for name, t in batch.items()}, multiplicity)
        try:
            values, norms = add(model, losses, parameters, part, multiplicity, clip_norm, total)
        except Uncovered:  # only in this batch: nothing was added yet
            if path is Path.bookkeeping:
                raise
            values, norms = _add_by_gradients(model, losses, parameters, part, multiplicity, clip_norm, total)
        all_losses.append(values.detach().float().cpu())
        all_norms.append(norms.float().cpu())
    changed = [name for name, version in _buffers(model).items() if before.get(name) != version]
    if changed:
        raise UserError(
            f"The forward changed the buffer '{changed[0]}', and checkpoints would hold it without noise; "
            "use a layer without running statistics for private training."
        )
    return total, torch.cat(all_losses), torch.cat(all_norms)


def _add_by_bookkeeping(
    model: nn.Module,
    losses: Losses,
    parameters: list[tuple[str, nn.Parameter]],
    batch: Batch,
    multiplicity: int,
    clip_norm: float,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    tape = one_pass(model, losses, parameters, batch, multiplicity)
    norms = tape.norms()
    parts = total.split([p.numel() for _, p in parameters])
    flat = {id(p): part for (_, p), part in zip(parameters, parts, strict=True)}
    tape.add_to(flat, clip_factor(norms, clip_norm))
    assert tape.losses is not None
    return tape.losses.unflatten(0, (-1, multiplicity)).mean(1), norms


def _add_by_gradients(
    model: nn.Module,
    losses: Losses,
    parameters: list[tuple[str, nn.Parameter]],
    batch: Batch,
    multiplicity: int,
    clip_norm: float,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    per_example = _by_loop if len(batch["row"]) == multiplicity else _by_vmap
    gradients, values = per_example(model, losses, parameters, batch, multiplicity)
    gradients = [g.to(total.dtype).flatten(1) for g in gradients]
    norms = torch.stack([g.square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = clip_factor(norms, clip_norm)
    begin_flat = 0
    for g in gradients:
        # A gradient that is not finite would make 0 * inf = NaN, so it is taken out before it is weighted.
        finite = torch.where(factors[:, None] > 0, g, torch.zeros_like(g))
        total[begin_flat : begin_flat + g.shape[1]] += factors @ finite
        begin_flat += g.shape[1]
    return values, norms


_covered: WeakKeyDictionary[nn.Module, dict[tuple[str, int, int], bool]] = WeakKeyDictionary()


def _is_covered(
    model: nn.Module, losses: Losses, parameters: list[tuple[str, nn.Parameter]], batch: Batch, multiplicity: int
) -> bool:
    """Whether book-keeping gives what a loop gives on two examples of the first batch; found out once for a model.

    A rule that takes a layer for what it is not, such as one whose first dimension is not the batch, must not decide how
    much an example is clipped.
    """
    known = _covered.setdefault(model, {})
    key = (getattr(losses, "__qualname__", type(losses).__qualname__), multiplicity, len(parameters))
    if key not in known:
        reason, quiet = "", False
        with _without_dropout(model):
            two = {name: t[:2] for name, t in batch.items()}
            try:
                free = clipped_sum(model, losses, parameters, two, multiplicity, 1.0, 1, Path.materialise)[2]
                # Half of the smaller norm, so that both are clipped: a rule that leaves the factors out is seen.
                finite = [n for n in ([] if isinstance(free, FakeTensor) else free.tolist()) if 0 < n < math.inf]
                clip = 0.5 * min(finite, default=2.0)
                found = clipped_sum(model, losses, parameters, two, multiplicity, clip, 2, Path.bookkeeping)
                expected = clipped_sum(model, losses, parameters, two, multiplicity, clip, 1, Path.materialise)
            except Uncovered as error:
                reason, quiet = str(error), isinstance(error, NoLayer)
            else:
                if isinstance(found[2], FakeTensor):  # memory is planned with them; they have no contents
                    return True
                # TF32 and bf16 round otherwise in products of other shapes; a wrong rule is off by far more.
                close = 0.05 if any(p.dtype is torch.bfloat16 for _, p in parameters) else 0.01
                same = torch.allclose(found[2], expected[2], rtol=close, atol=0, equal_nan=True)
                if not same or (found[0] - expected[0]).norm() > close * (1e-6 * clip + expected[0].norm()):
                    reason = "it gives other gradients than a loop does"
        known[key] = not reason
        if reason and not quiet:
            log.warning("Clipping goes the slow way, because book-keeping does not cover the model: %s.", reason)
    return known[key]


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
