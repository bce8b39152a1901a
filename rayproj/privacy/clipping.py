"""Per-example gradients, clipped to a norm and summed.

The K views of an example are one group: the gradient of their mean loss is the example's gradient, so it costs what an
ordinary backward over K images costs, and any layer works. Two ways of computing the same numbers: one backward an
example, or `torch.func.vmap` over a chunk of examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rayproj.engine.task import Batch
from rayproj.errors import UserError

Losses = Callable[[nn.Module, Batch], Tensor]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over the examples of their clipped gradients.

    Args:
        losses: (model, batch) to per-row losses; row b depends on row b alone.
        parameters: (name, parameter) of what is trained, in the order of the flat vector.
        batch: B examples, possibly none.
        multiplicity: K, views of an example.
        chunk: examples at a time; 1 is a backward each, more is vmap.

    Returns:
        The flat sum, fp32 [number of parameters]; the examples' losses [B] and gradient norms [B] before clipping.

    Raises:
        UserError: the forward changed a buffer, which a checkpoint would release without noise.
    """
    size, before = len(batch["row"]), _buffers(model)
    first = parameters[0][1]
    total = torch.zeros(sum(p.numel() for _, p in parameters), dtype=torch.float32, device=first.device)
    total = total.double() if first.dtype is torch.float64 else total
    all_losses, all_norms = [torch.zeros(0)], [torch.zeros(0)]
    per_example = _by_loop if chunk == 1 else _by_vmap
    for begin in range(0, size, chunk):
        part = with_views({name: t[begin : begin + chunk] for name, t in batch.items()}, multiplicity)
        gradients, values = per_example(model, losses, parameters, part, multiplicity)
        gradients = [g.to(total.dtype).flatten(1) for g in gradients]
        norms = torch.stack([g.square().sum(1) for g in gradients]).sum(0).sqrt()
        factors = clip_factor(norms, clip_norm)
        begin_flat = 0
        for g in gradients:
            # A gradient that is not finite would make 0 * inf = NaN, so it is taken out before it is weighted.
            finite = torch.where(factors[:, None] > 0, g, torch.zeros_like(g))
            total[begin_flat : begin_flat + g.shape[1]] += factors @ finite
            begin_flat += g.shape[1]
        all_losses.append(values.detach().float().cpu())
        all_norms.append(norms.float().cpu())
    changed = [name for name, version in _buffers(model).items() if before.get(name) != version]
    if changed:
        raise UserError(
            f"The forward changed the buffer '{changed[0]}', and checkpoints would hold it without noise; "
            "use a layer without running statistics for private training."
        )
    return total, torch.cat(all_losses), torch.cat(all_norms)


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
