"""What a pass of book-keeping over a model leaves behind (`bookkeeping`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rayproj.errors import UserError


class Uncovered(UserError):
    """The model does something that book-keeping has no rule for; the message says what."""


class NoLayer(Uncovered):
    """The losses call no layer at all, as those of a self-test do."""


Rule = Callable[["Tape", "Call", Tensor, bool], None]
"""(tape, call, gradient of the output, whether the call is the only use of the layer's parameters)"""


@dataclass
class Call:
    """One call of a layer: its module, the parameters of it that are trained, and its input."""

    module: nn.Module
    own: dict[str, nn.Parameter]
    rule: Rule
    x: Tensor
    version: int


@dataclass
class Tape:
    """What one pass leaves behind.

    Attributes:
        names: of the trained parameters, by id.
        rows: of the batch: the views of an example are neighbours.
        views: K, rows of an example.
        squares: [B], of the norms, as far as they are known.
        anchor: what everything in the graph depends on, so that a backward to it passes by everything.
        losses: [rows], once the forward is done.
        uses: of the parameters, by id, in the forward.
        kept: gradients of the examples [B, numel], whose norms are among the squares.
        added: the same of parameters with perhaps more than one use, whose norms are not yet.
        held: (parameter, inputs, output gradients, what makes the gradient of them), rows first.
        pieces: rows of a parameter that are the weight of a layer of their own, by its id and their beginning.
        plain: layers run as they are, as while a rule runs one.
        sums: whether a weighted sum is to be made; else only norms are.
    """

    names: dict[int, str]
    rows: int
    views: int
    squares: Tensor
    anchor: Tensor
    losses: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)
    kept: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    added: dict[int, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    held: list[tuple[nn.Parameter, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = field(default_factory=list)
    pieces: dict[tuple[int, int], nn.Parameter] = field(default_factory=dict)
    plain: bool = False
    sums: bool = True

    @property
    def size(self) -> int:
        return self.rows // self.views

    @property
    def dtype(self) -> torch.dtype:
        """fp32, also of a bf16 model, or fp64: of norms, gradients and sums."""
        return self.squares.dtype

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Gradients [B, ...] of one use of the parameter; those of several add up before any norm is taken."""
        gradients = gradients.to(self.dtype).reshape(self.size, -1)
        if id(parameter) in self.added:
            gradients = self.added[id(parameter)][1] + gradients
        self.added[id(parameter)] = parameter, gradients

    def hold(self, parameter: nn.Parameter, x: Tensor, g: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Inputs and output gradients, rows first, of which `gradient` makes the sum over the rows."""
        if self.sums:
            self.held.append((parameter, x, g, gradient))

    def of_rows(self, gradients: Tensor) -> Tensor:
        """[B, ...] from [rows, ...]."""
        return gradients if self.views == 1 else gradients.unflatten(0, (-1, self.views)).sum(1)

    def piece(self, parameter: nn.Parameter, begin: int, rows: int) -> Tensor:
        """Some rows of a parameter, as a parameter of their own if it is trained."""
        part = parameter.detach()[begin : begin + rows]
        if id(parameter) not in self.names:
            return part
        return self.pieces.setdefault((id(parameter), begin), nn.Parameter(part))

    def norms(self) -> Tensor:
        """[B], of the examples' whole gradients."""
        for _, gradients in self.added.values():
            self.squares += kernels(gradients).norm_square(gradients)
        if self.sums:
            self.kept += self.added.values()
        self.added.clear()
        return self.squares.sqrt()

    def add_to(self, flat: dict[int, Tensor], factors: Tensor) -> None:
        """Add the sum of the examples' gradients times their factors [B], and let go of all that is held.

        Args:
            flat: by id of the parameter, its part of the flat sum.
        """
        for (whole, begin), piece in self.pieces.items():
            flat[id(piece)] = flat[whole][begin * piece[0].numel() :][: piece.numel()]
        while self.kept:
            parameter, gradients = self.kept.pop()
            kernels(gradients).accumulate(flat[id(parameter)], gradients, factors)
        # What is not finite would make 0 * inf = NaN, so it is taken out before it is weighted.
        alive = (factors > 0).repeat_interleave(self.views)
        fake = isinstance(factors, FakeTensor)  # memory is planned with them; they have no contents
        chosen: Any = slice(None) if fake or bool(alive.all()) else alive
        weights = factors.repeat_interleave(self.views)[chosen]
        while self.held:
            parameter, x, g, gradient = self.held.pop()
            g = g[chosen] * weights.view(-1, *[1] * (g.ndim - 1))
            flat[id(parameter)] += gradient(x[chosen], g).flatten()

    def source(self, value: Tensor, seen: Callable[[Tensor], None]) -> Tensor:
        """The value as a start of the graph, whose gradient is shown to `seen`."""
        made: Tensor = Source.apply(self.anchor, [value])
        self.watch(made, seen)
        return made

    def watch(self, tensor: Tensor, seen: Callable[[Tensor], None]) -> None:
        """Show the gradient of the tensor to `seen`."""
        if self.losses is not None:
            return  # activation checkpointing runs layers again, for what they save alone

        def once(g: Tensor) -> None:
            if self.losses is None:
                raise Uncovered("the losses make a backward of their own")
            seen(g.detach())

        tensor.register_hook(once)

    def spread(self, parameter: nn.Parameter, value: Tensor, shape: Sequence[int]) -> Tensor:
        """A copy for each row of a value that is made of the parameter: [rows, *shape], with its elements in `shape`."""

        def seen(g: Tensor) -> None:
            found = self.of_rows(g).reshape(-1, *value.shape)
            if value is not parameter:
                found = torch.autograd.grad(value, parameter, found, retain_graph=True, is_grads_batched=True)[0]
            self.add(parameter, found)

        self.uses[id(parameter)] += 1
        return self.source(value.detach().reshape(1, *shape).expand(self.rows, *shape), seen)


class Source(torch.autograd.Function):
    """A tensor that depends on the anchor, so that a backward to the anchor passes by. In a list: else it would be a view,
    which must not be changed in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: list[Tensor]) -> Tensor:
        return value.pop()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        return None, None


def kernels(tensor: Tensor) -> Any:
    """The functions of `kernels.gram` for the tensor's device."""
    if tensor.is_cuda and tensor.dtype is torch.float32:
        from rayproj.kernels import gram_triton  # type: ignore[attr-defined]

        return gram_triton
    from rayproj.kernels import gram  # type: ignore[attr-defined]

    return gram
