"""How each kind of layer gives its examples' gradients to the tape: one rule for each, in the table `RULES`.

A rule sees a call of a layer, its input and the gradient of its output, rows first. The norm of a weight's gradient comes
from the gradient itself or from two Gram matrices (`kernels.gram`), whichever is cheaper at the layer's shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from rayproj.privacy.tape import Call, Rule, Tape, Uncovered, kernels

MEMORY = 1.6  # a layer may hold so many times the elements of its inputs and output gradients
BATCHED = 4.0  # a product for each example takes 1 + BATCHED / √tokens times as long as one product for all (measured)
PAIR = (
    100  # operations in whose time an entry of a Gram matrix is summed and multiplied, being bound by memory (measured)
)
PIECE, PIECE_ON_GPU = 2**19, 2**27  # elements of a temporary: what fits a cache, and what fills a GPU


class How(Enum):
    """Of a weight: what gives the norms, and what is held until the clip factors are known."""

    KEEP = "the examples' gradients, which are held"
    GRAM = "Gram matrices; inputs and output gradients are held"
    AGAIN = "the examples' gradients, which are not held; inputs and output gradients are"
    ADD = "the examples' gradients, summed with those of other uses of the weight"


def choose(tokens: int, inputs: int, outputs: int, pixels: int, channels: int, sums: bool = True) -> How:
    """The fastest way for a weight [outputs, inputs], of those whose memory is not much more than an ordinary backward's.

    An example's gradient is a product of 2 tokens inputs outputs operations; that of the weighted sum is as many for each
    example, unless the examples' gradients are held, of which it is made at once. The Gram matrices are products of
    2 pixels² channels and 2 tokens² outputs (Bu et al. 2022, arXiv 2205.10683, section 3.2; of the pixels instead of the
    unfolded inputs, see `kernels.gram`).

    Args:
        tokens: entries of an example's output, over all its views.
        pixels, channels: shape of its input as it lies in memory, which a convolution unfolds to [tokens, inputs].
        sums: whether the weighted sum is made too, and not only the norms.
    """
    product = 2 * tokens * inputs * outputs
    gram = 2 * pixels**2 * channels + 2 * tokens**2 * outputs
    gram += PAIR * (pixels**2 + tokens**2) if tokens > 1 else 0
    batched = (1 + BATCHED / math.sqrt(tokens)) * product
    times = {How.GRAM: gram + sums * product, How.AGAIN: batched + sums * product}
    if sums and inputs * outputs <= MEMORY * (pixels * channels + tokens * outputs):
        times[How.KEEP] = batched
    return min(times, key=lambda how: times[how])


def _weight(
    tape: Tape,
    parameter: nn.Parameter,
    how: How,
    x: Tensor,
    g: Tensor,
    gram: tuple[int, Callable[[Tensor, Tensor], Tensor]],
    gradients: tuple[int, Callable[[Tensor, Tensor, Tensor | None], Tensor]],
) -> bool:
    """Take the norms of a weight's gradients, and hold the gradients themselves if that is how.

    Args:
        x, g: [B, ...] inputs and output gradients.
        gram: elements of its temporaries for an example, and what makes squared norms of some examples' x and g.
        gradients: the same for gradients [n, numel], into a tensor of that shape if there is one.

    Returns:
        Whether the inputs and output gradients are still to be held.
    """
    each = (gram if how is How.GRAM else gradients)[0]
    n = max(1, (PIECE_ON_GPU if x.is_cuda else PIECE) // each)  # examples at a time
    kept = g.new_empty(tape.size, parameter.numel()) if how in (How.KEEP, How.ADD) else None
    for i in range(0, tape.size, n):
        part = slice(i, i + n)
        if how is How.GRAM:
            # What the sum may have lost to rounding, where its terms cancel: an example may be clipped by that more, never
            # less. (An Embedding's indices are no tensor of terms: its Gram matrix has no rounding.)
            unfolded = math.prod(parameter.shape[2:])  # a convolution reads an input so many times
            inputs = unfolded * _square(x[part]) if x.is_floating_point() else 1
            lost = torch.finfo(g.dtype).eps * _square(g[part]) * inputs
            tape.squares[part] += gram[1](x[part], g[part]) + lost
        else:
            found = gradients[1](x[part], g[part], None if kept is None else kept[part])
            if how is not How.ADD:
                tape.squares[part] += kernels(g).norm_square(found)
    if kept is not None and how is How.ADD:
        tape.add(parameter, kept)
    elif kept is not None:
        tape.kept.append((parameter, kept))
    return kept is None


def _square(t: Tensor) -> Tensor:
    """[B], of each entry."""
    t = t.flatten(1)
    return torch.linalg.vecdot(t, t)


def linear(tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    """d W = Σ_t g_t x_tᵀ; d b = Σ_t g_t, whose norm is that of the sum also where there is more than one t."""
    x = call.x.reshape(tape.size, -1, call.x.shape[-1]).to(tape.dtype)
    g = g.reshape(tape.size, -1, g.shape[-1]).to(tape.dtype)
    if "bias" in call.own:
        tape.add(call.own["bias"], g.sum(1))
    if "weight" not in call.own:
        return
    weight, tokens = call.own["weight"], x.shape[1]
    p, d = weight.shape

    def gradients(x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        return torch.bmm(g.mT, x, out=None if out is None else out.view(-1, p, d)).view(len(x), -1)

    how = choose(tokens, d, p, tokens, d, tape.sums) if alone else How.ADD
    gram = 2 * tokens**2, kernels(g).linear_gram_norm
    if _weight(tape, weight, how, x, g, gram, (d * p + tokens * (d + p), gradients)):
        rows = tape.rows
        tape.hold(weight, x.view(rows, -1, d), g.view(rows, -1, p), lambda x, g: g.flatten(0, 1).mT @ x.flatten(0, 1))


def _conv(tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    """A convolution is a Linear on unfolded pixels. One along a line is one on pictures of height 1."""
    module, x = call.module, call.x
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    line, groups = isinstance(module, nn.Conv1d), module.groups
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)
    else:
        padding = tuple(module.padding)
    x, g = x.to(tape.dtype), g.to(tape.dtype)
    if line:
        x, g, padding = x.unsqueeze(2), g.unsqueeze(2), (0, *padding)
    kernel, stride, dilation = (
        (1, v[0]) if line else (v[0], v[1]) for v in (module.kernel_size, module.stride, module.dilation)
    )
    if "bias" in call.own:
        tape.add(call.own["bias"], tape.of_rows(g.sum((2, 3))))
    if "weight" not in call.own:
        return
    weight, (up, across) = call.own["weight"], g.shape[2:]
    shape = (*weight.shape[:2], *kernel)
    inputs = shape[1] * math.prod(kernel)

    def summed(x: Tensor, g: Tensor) -> Tensor:
        return conv2d_weight(x, shape, g, stride, padding, dilation, groups)

    def gradients(x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        """Of inputs [n, K, channels, height, width]: they are unfolded in one copy."""
        n = len(x)
        sides = (padding[1], padding[1], padding[0], padding[0])
        padded = F.pad(x, sides) if any(padding) else x
        s = padded.stride()
        unfolded = padded.as_strided(
            (n, groups, shape[1], *kernel, tape.views, up, across),
            (s[0], shape[1] * s[2], s[2], dilation[0] * s[3], dilation[1] * s[4], s[1], stride[0] * s[3], stride[1] * s[4]),
        ).reshape(n * groups, inputs, -1)  # fmt: skip
        by_group = g.transpose(1, 2).reshape(n * groups, shape[0] // groups, -1)
        into = None if out is None else out.view(n * groups, -1, inputs)
        return torch.bmm(by_group, unfolded.mT, out=into).view(n, -1)

    def by_example(x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        """The same where an example's views fill an ordinary backward."""
        found = [summed(*pair).flatten() for pair in zip(x, g, strict=True)]
        return torch.stack(found, out=out)

    def gram(x: Tensor, g: Tensor) -> Tensor:
        return kernels(g).conv_gram_norm(x, g, kernel, padding, stride, dilation)

    tokens, pixels = tape.views * up * across, tape.views * x[0, 0].numel()
    how = choose(tokens, inputs, shape[0], pixels, x.shape[1], tape.sums) if alone else How.ADD
    if groups > 1 and how is How.GRAM:
        how = How.AGAIN
    by_views = x.unflatten(0, (tape.size, tape.views)), g.unflatten(0, (tape.size, tape.views))
    make = by_example if tape.views > 1 and kernel != (1, 1) else gradients
    if _weight(tape, weight, how, *by_views, (pixels**2 + tokens**2, gram), (tokens * groups * inputs, make)):
        tape.hold(weight, x, g, summed)


def _embedding(tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    """d W[v] = Σ of g_t over the t whose index is v: the Gram matrix of the inputs says which indices are equal."""
    module = call.module
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise Uncovered("an Embedding with max_norm or scale_grad_by_freq mixes examples")
    weight = call.own["weight"]
    entries, dim = weight.shape
    index = call.x.reshape(tape.size, -1)
    g = g.reshape(tape.size, -1, dim).to(tape.dtype)
    if module.padding_idx is not None:
        g = g.masked_fill((index == module.padding_idx).unsqueeze(-1), 0)
    tokens = index.shape[1]

    def gradients(index: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        n = len(index)
        place = index + entries * torch.arange(n, device=index.device)[:, None]
        made = g.new_zeros(n * entries, dim).index_add_(0, place.flatten(), g.flatten(0, 1)).view(n, -1)
        return made if out is None else out.copy_(made)

    def gram(index: Tensor, g: Tensor) -> Tensor:
        return ((index[:, :, None] == index[:, None, :]) * (g @ g.mT)).sum((1, 2))

    def summed(index: Tensor, g: Tensor) -> Tensor:
        return g.new_zeros(entries, dim).index_add_(0, index.flatten(), g.flatten(0, -2))

    how = (How.GRAM if entries > tokens else How.KEEP if tape.sums else How.AGAIN) if alone else How.ADD
    if _weight(tape, weight, how, index, g, (2 * tokens**2, gram), (entries * dim, gradients)):
        tape.hold(weight, index.view(tape.rows, -1), g.view(tape.rows, -1, dim), summed)


def _last_axes(tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    """LayerNorm and RMSNorm: y = x̂ γ + β."""
    module, shape = call.module, tuple(call.module.normalized_shape)  # type: ignore[arg-type]
    g = g.to(tape.dtype)
    between = tuple(range(1, g.ndim - len(shape)))
    if "bias" in call.own:
        tape.add(call.own["bias"], tape.of_rows(g.sum(between) if between else g))
    if "weight" in call.own:
        x, eps = call.x.to(tape.dtype), module.eps
        if isinstance(module, nn.LayerNorm):
            x = F.layer_norm(x, shape, None, None, module.eps)
        else:  # by default the ε of the dtype that the layer computed in
            x = F.rms_norm(x, shape, None, torch.finfo(call.x.dtype).eps if eps is None else eps)  # type: ignore[arg-type]
        x = x * g
        tape.add(call.own["weight"], tape.of_rows(x.sum(between) if between else x))


def any_layer(tape: Tape, call: Call, g: Tensor, alone: bool) -> None:
    """Any layer of one input: its backward is done again for each example alone, all at once by vmap."""

    def gradients(x: Tensor, g: Tensor) -> dict[str, Tensor]:
        def run(values: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(call.module, values, (x,))

        found: dict[str, Tensor] = torch.func.vjp(run, {n: p.detach() for n, p in call.own.items()})[1](g)[0]
        return found

    tape.plain = True
    try:
        grouped = [t.unflatten(0, (tape.size, tape.views)) for t in (call.x, g)]
        for name, found in torch.func.vmap(gradients)(*grouped).items():
            tape.add(call.own[name], found)
    except RuntimeError as error:
        raise Uncovered(f"a {type(call.module).__name__} has no rule, and vmap cannot run it ({error})") from error
    finally:
        tape.plain = False


def group_norm(tape: Tape, module: nn.GroupNorm, own: dict[str, nn.Parameter], x: Tensor) -> Tensor:
    """A GroupNorm with a copy of its parameters for each row. The groups of all rows are groups of one: autograd's kernel,
    which sums the gradients of the parameters over rows, then has one row, and gives each copy its own."""

    def copies(name: str) -> Tensor | None:
        p = getattr(module, name)
        if name in own:
            return tape.spread(p, p, p.shape).flatten()
        return None if p is None else p.detach().expand(tape.rows, -1).flatten()

    y = F.group_norm(
        x.reshape(1, -1, *x.shape[2:]), tape.rows * module.num_groups, copies("weight"), copies("bias"), module.eps
    )
    return y.view(x.shape)


RULES: dict[Any, Rule] = {
    nn.Linear.forward: linear,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _last_axes,
    nn.RMSNorm.forward: _last_axes,
}
"""By what the layer does, not by its class: a subclass with a forward of its own goes by `any_layer`."""
