"""Norms of per-example weight gradients from Gram matrices, without the gradients, and sums of clipped gradients.

The weight gradient of one example is the product GᵀX of the output gradients G [T, p] and the inputs X [T, d] of a layer,
so its squared norm is the sum over t, s of (XXᵀ)[t, s] (GGᵀ)[t, s] (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
arXiv 2110.05679, section 4). Eager torch references; `gram_triton` has the same functions as Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype that norms and sums are made in."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def linear_gram_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms of the products g[b]ᵀ x[b].

    Args:
        x: [B, T, d], inputs.
        g: [B, T, p], output gradients.

    Returns:
        [B], fp32, or fp64 of fp64.
    """
    x, g = _wide(x), _wide(g)
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * g.square().sum((1, 2))
    return torch.linalg.vecdot((x @ x.mT).flatten(1), (g @ g.mT).flatten(1))


def conv_gram_norm(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Squared norms of the weight gradients of a convolution of one group.

    The Gram matrix of the unfolded input at (t, s) is the sum over the kernel's offsets δ of the Gram matrix of the pixels
    at (t + δ, s + δ); an offset is one of rows and one of columns, so that the sum is made in two short ones.

    Args:
        x: [B, views, channels, height, width], inputs of the views of an example.
        g: [B, views, p, height out, width out], output gradients.
        kernel, padding, stride, dilation: of the convolution, rows and columns.

    Returns:
        [B], fp32, or fp64 of fp64.
    """
    x, g = _wide(x), _wide(g)
    size, views, _, *sides = x.shape
    pixels, outputs = x.transpose(1, 2).flatten(2), g.transpose(1, 2).flatten(2)
    gram = (pixels.mT @ pixels).view(size, views, *sides, views, *sides)
    for axis in (1, 0):
        options = kernel[axis], padding[axis], stride[axis], dilation[axis]
        gram = _sum_over_offsets(gram, 2 + axis, 5 + axis, g.shape[3 + axis], *options)
    return torch.linalg.vecdot(gram.flatten(1), (outputs.mT @ outputs).flatten(1))


def offsets(size: int, out: int, kernel: int, padding: int, stride: int, dilation: int) -> list[tuple[slice, slice]]:
    """For each offset of a kernel along one axis, the positions that it reads and those of the output that it goes to.

    Args:
        size, out: positions of the input, without padding, and of the output.
    """
    found = []
    for k in range(kernel):
        shift = k * dilation - padding  # output o reads input o * stride + shift
        low = max(0, -(shift // stride))
        high = min(out, (size - 1 - shift) // stride + 1)
        if low < high:
            begin = low * stride + shift
            found.append((slice(begin, begin + (high - low - 1) * stride + 1, stride), slice(low, high)))
    return found


def _sum_over_offsets(gram: Tensor, first: int, second: int, out: int, *options: int) -> Tensor:
    """Sum a Gram matrix over the offsets along one axis of the pictures, which is `first` and `second` of its axes."""
    if options == (1, 0, 1, 1):
        return gram
    shape = list(gram.shape)
    shape[first] = shape[second] = out
    total = gram.new_zeros(shape)
    for read, written in offsets(gram.shape[first], out, *options):
        to = [slice(None)] * gram.ndim
        of = list(to)
        to[first] = to[second] = written
        of[first] = of[second] = read
        total[tuple(to)] += gram[tuple(of)]
    return total


def norm_square(gradients: Tensor) -> Tensor:
    """Squared norm of each row of [B, n]; fp32, or fp64 of fp64."""
    gradients = _wide(gradients)
    return torch.linalg.vecdot(gradients, gradients)


def accumulate(total: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """total [n] += factors [B] @ gradients [B, n]; a row whose factor is zero is not read, so it may hold NaN."""
    if not all_positive(factors):
        alive = factors > 0
        gradients, factors = gradients[alive], factors[alive]
    total.addmv_(gradients.to(total.dtype).mT, factors.to(total.dtype))


def all_positive(factors: Tensor) -> bool:
    """Also of fake tensors, with which memory is planned: they have no contents."""
    return isinstance(factors, FakeTensor) or bool((factors > 0).all())
