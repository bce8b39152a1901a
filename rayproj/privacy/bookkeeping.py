"""Per-example clipping in one backward (book-keeping: Bu et al. 2023, arXiv 2210.00038, algorithm 1).

Layers run on detached weights, and what reaches their outputs in the backward gives the examples' norms. Then each layer
either holds the examples' gradients, which are summed by weight, or its inputs and output gradients, of which one product
gives the weighted sum. So a step costs one forward, one backward and, where the layer's shapes ask for it, a Gram matrix.
Parameters never enter the graph of the loss: their gradients, and DeepSpeed's hooks on them, are never run.

What is not covered raises `Uncovered`, and the caller takes another way; nothing is skipped. A parameter is covered if all
that the loss sees of it goes through layers that are: a parameter in the graph of the loss is one that was used otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from rayproj.engine.task import Batch
from rayproj.privacy.layers import RULES, any_layer, group_norm, linear
from rayproj.privacy.tape import Call, NoLayer, Rule, Tape, Uncovered


def one_pass(
    model: nn.Module, losses: Callable[[nn.Module, Batch], Tensor], parameters: list[tuple[str, nn.Parameter]],
    batch: Batch, views: int, sums: bool = True,
) -> Tape:  # fmt: skip
    """Run the model once, forward and backward.

    Args:
        losses: (model, batch) to losses of the rows.
        parameters: what is trained.
        batch: rows in which the views of an example are neighbours.
        sums: whether to hold what the weighted sum is made of.

    Returns:
        The examples' norms and losses, and what their weighted sum is made of.

    Raises:
        Uncovered: the model does something that there is no rule for.
    """
    first = parameters[0][1]
    wide = torch.float64 if first.dtype is torch.float64 else torch.float32
    rows = len(batch["row"])
    tape = Tape(
        names={id(p): name for name, p in parameters},
        rows=rows,
        views=views,
        squares=torch.zeros(rows // views, dtype=wide, device=first.device),
        anchor=torch.zeros((), device=first.device, requires_grad=True),
        sums=sums,
    )
    with _instrumented(model, tape) as bare:
        with bare:
            values = losses(model, batch)
        if values.shape != (rows,):
            raise Uncovered(f"the losses have the shape {tuple(values.shape)}, not one of each row")
        tape.losses = values.detach()
        _refuse_direct_uses(values, tape)
        if values.requires_grad:
            torch.autograd.grad(values.sum() / views, tape.anchor, allow_unused=True)
    tape.calls.clear()
    return tape


def _refuse_direct_uses(values: Tensor, tape: Tape) -> None:
    """Raise Uncovered for a trained parameter in the graph of the losses, or an input that was changed after its use."""
    if not tape.uses:
        raise NoLayer("the losses call no layer of the model that is trained")
    stack, seen = [values.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [after for after, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not tape.anchor:
            name = tape.names.get(id(leaf))
            raise Uncovered(
                "something besides the trained parameters requires gradients"
                if name is None
                else f"the parameter '{name}' is used outside of a layer that has a rule"
            )
    for whole, _ in tape.pieces:
        if tape.uses[whole]:
            raise Uncovered(f"the parameter '{tape.names[whole]}' is used both in parts and as a whole")
    for call in tape.calls:
        if call.x._version != call.version:
            raise Uncovered(f"the input of a {type(call.module).__name__} is changed in place after it")


@contextmanager
def _instrumented(model: nn.Module, tape: Tape) -> Iterator[Any]:
    """The model's layers keep book in the block. Gives what parameters that belong to no layer need in the forward."""
    before: list[tuple[nn.Module, Any]] = []
    bare: dict[int, nn.Parameter] = {}
    try:
        for module in model.modules():
            own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in tape.names}
            if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
                if any(id(p) in tape.names for p in module.parameters()):
                    before.append((module, module.__dict__.get("forward")))
                    module.forward = partial(_as_attention, tape, module, module.forward)  # type: ignore[method-assign]
                continue
            rule, norm = RULES.get(type(module).forward), type(module).forward is nn.GroupNorm.forward
            if not own:
                continue
            if rule is None and next(module.children(), None) is not None:  # its parameters belong to no layer
                bare |= {id(p): p for p in own.values()}
                continue
            before.append((module, module.__dict__.get("forward")))
            forward: Any = module.forward
            layer: Any = module
            module.forward = (
                partial(_as_group_norm, tape, layer, own, forward)
                if norm
                else partial(_as_layer, tape, module, own, rule or any_layer, forward)
            )
        yield _Bare(tape, bare) if bare else nullcontext()
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _as_layer(
    tape: Tape, module: nn.Module, own: dict[str, nn.Parameter], rule: Rule, forward: Any, *args: Any, **kwargs: Any
) -> Any:
    """A call of a layer whose output's gradient its rule is shown."""
    if tape.plain or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    for p in own.values():
        p.requires_grad_(False)
    try:
        y = forward(*args, **kwargs)
    finally:
        for p in own.values():
            p.requires_grad_(True)
    inputs = [*args, *kwargs.values()]
    what = type(module).__name__
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(y, Tensor):
        raise Uncovered(f"a {what} is called with more than one tensor, or gives more than one")
    x = inputs[0].detach()
    if not x.ndim or not y.ndim or x.shape[0] != y.shape[0] or x.shape[0] not in (1, tape.rows):
        raise Uncovered(f"a {what} is called on {tuple(x.shape)}, which is not one entry for each of {tape.rows} rows")
    if x.shape[0] != tape.rows:  # the same for all rows, as the positions of a text are
        x, y = x.expand(tape.rows, *x.shape[1:]), y.expand(tape.rows, *y.shape[1:])
    call = Call(module, own, rule, x, x._version)
    if tape.losses is None:
        tape.calls.append(call)
        tape.uses.update(id(p) for p in own.values())

    def seen(g: Tensor) -> None:
        alone = all(tape.uses[id(p)] == 1 for p in own.values())
        call.rule(tape, call, g, alone)
        call.x = tape.anchor  # lets go of the input, unless it is held

    if y.requires_grad:
        tape.watch(y, seen)
        return y
    return tape.source(y, seen)


def _as_group_norm(tape: Tape, module: nn.GroupNorm, own: dict[str, nn.Parameter], forward: Any, x: Tensor) -> Tensor:
    if tape.plain or not torch.is_grad_enabled():
        plain: Tensor = forward(x)
        return plain
    if x.shape[0] != tape.rows:
        raise Uncovered(
            f"a GroupNorm is called on {tuple(x.shape)}, which is not one entry for each of {tape.rows} rows"
        )
    return group_norm(tape, module, own, x)


def _as_attention(
    tape: Tape, module: nn.MultiheadAttention, forward: Any, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`nn.MultiheadAttention` written out, whose own forward calls none of its projections as a layer."""
    if tape.plain or not torch.is_grad_enabled():
        made: tuple[Tensor, Tensor | None] = forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return made
    if module.bias_k is not None or module.add_zero_attn or query.ndim != 3:
        raise Uncovered("a MultiheadAttention has add_bias_kv or add_zero_attn, or is called without a batch")
    inputs = [t if module.batch_first else t.transpose(0, 1) for t in (query, key, value)]
    width, own_weights = module.embed_dim, (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)

    def projected(i: int) -> Tensor:
        """[B, heads, tokens, width of a head], of the query, the key or the value."""
        whole, bias = module.in_proj_weight, None
        weight = tape.piece(whole, i * width, width) if module._qkv_same_embed_dim else own_weights[i]
        if module.in_proj_bias is not None:
            bias = tape.piece(module.in_proj_bias, i * width, width)
        own: Any = {n: p for n, p in (("weight", weight), ("bias", bias)) if p is not None and p.requires_grad}

        def run(x: Tensor) -> Tensor:
            return F.linear(x, weight.detach(), None if bias is None else bias.detach())

        y: Tensor = _as_layer(tape, module, own, linear, run, inputs[i]) if own else run(inputs[i])
        return y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    q, k, v = projected(0), projected(1), projected(2)
    mask = torch.zeros(len(q), 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
    if key_padding_mask is not None:
        mask = mask + _added(key_padding_mask, q.dtype)[:, None, None]
    if attn_mask is not None:  # [L, S], or [B · heads, L, S]
        added = _added(attn_mask, q.dtype)
        mask = mask + (added if added.ndim == 2 else added.unflatten(0, (-1, module.num_heads)))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + mask
    weights = F.dropout(scores.softmax(-1), module.dropout, module.training)
    out = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    out = out if module.batch_first else out.transpose(0, 1)
    return out, (weights.mean(1) if average_attn_weights else weights) if need_weights else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of what is left out as one that is added to the scores; such a one as it is."""
    return mask.to(dtype).masked_fill(mask, -math.inf) if mask.dtype is torch.bool else mask


ELEMENTWISE = {f"{how}{name}" for how in ("", "r", "i") for name in ("add", "sub", "mul", "div", "truediv")}


class _Bare(TorchFunctionMode):
    """Parameters that belong to no layer, and what is made of one of them alone (views, casts), become a copy for each row
    where they meet the rows: in an elementwise operation, or where they are expanded to them."""

    def __init__(self, tape: Tape, bare: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.tape = tape
        self.shared: dict[int, tuple[Tensor, nn.Parameter]] = {key: (p, p) for key, p in bare.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        found = [t for t in leaves if id(t) in self.shared]
        if not found or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = func.__name__.strip("_")
        if len(found) == len(leaves):
            out = func(*args, **kwargs)
            if len(found) == 1:
                parameter = self.shared[id(found[0])][1]
                rows = self.tape.rows
                if name == "expand" and found[0].shape[:1] == (1,) and out.ndim == found[0].ndim and len(out) == rows:
                    return self.tape.spread(parameter, found[0], found[0].shape[1:]).expand(out.shape)
                made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.requires_grad]
                self.shared |= {id(t): (t, parameter) for t in made}
            return out
        if name in ELEMENTWISE and len(leaves) == len(args) == 2 and len(found) == 1:
            shared, rank = found[0], max(t.ndim for t in leaves)
            shape = torch.broadcast_shapes(*(t.shape for t in leaves))
            if shape[:1] == (self.tape.rows,) and (shared.ndim < rank or len(shared) == 1):
                own = shared.shape[1:] if shared.ndim == rank else (*[1] * (rank - 1 - shared.ndim), *shared.shape)
                copies = self.tape.spread(self.shared[id(shared)][1], shared, own)
                return func(*(copies if a is shared else a for a in args), **kwargs)
        return func(*args, **kwargs)  # the parameter enters the graph, and is found there
