"""Norms from Gram matrices against those of gradients that autograd makes, and the Triton kernels against the references."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayproj.kernels import gram
from tests.support import interpreter


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.integers(1, 9)] * 4))
def test_linear_norms(sizes: tuple[int, int, int, int]) -> None:
    size, tokens, d, p = sizes
    torch.manual_seed(0)
    x, g = torch.randn(size, tokens, d).double(), torch.randn(size, tokens, p).double()
    expected = torch.stack([(b.T @ a).square().sum() for a, b in zip(x, g, strict=True)])
    torch.testing.assert_close(gram.linear_gram_norm(x, g), expected, rtol=1e-12, atol=1e-12)


def conv_case(size: int, views: int, channels: int, p: int, sides: Any, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, output gradients and, of autograd, the squared norms of the examples' gradients."""
    kernel, padding, stride, dilation = options
    x = torch.randn(size, views, channels, *sides).double()
    weight = torch.randn(p, channels, *kernel).double().requires_grad_()
    shape = torch.nn.functional.conv2d(x[0], weight, None, stride, padding, dilation).shape
    g = torch.randn(size, *shape).double()
    found = []
    for a, b in zip(x, g, strict=True):
        out = torch.nn.functional.conv2d(a, weight, None, stride, padding, dilation)
        found.append(torch.autograd.grad(out, weight, b)[0].square().sum())
    return x, g, torch.stack(found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    options=st.tuples(
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ),
)
def test_convolution_norms(sizes: Any, sides: Any, options: Any) -> None:
    kernel, padding, _, dilation = options
    if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(sides, padding, dilation, kernel, strict=True)):
        return
    torch.manual_seed(0)
    x, g, expected = conv_case(*sizes, sides, options)
    torch.testing.assert_close(gram.conv_gram_norm(x, g, *options), expected, rtol=1e-11, atol=1e-11)


def test_norms_of_bf16_are_made_in_fp32() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, 50, 40).bfloat16(), torch.randn(3, 50, 30).bfloat16()
    found = gram.linear_gram_norm(x, g)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), gram.linear_gram_norm(x.double(), g.double()), rtol=1e-5, atol=0)


def test_a_sum_leaves_out_what_has_no_factor() -> None:
    total, gradients = torch.ones(4), torch.arange(12.0).view(3, 4)
    gradients[1] = math.nan
    gram.accumulate(total, gradients, torch.tensor([0.5, 0.0, 2.0]))
    assert torch.equal(total, 1 + 0.5 * gradients[0] + 2 * gradients[2])
    torch.testing.assert_close(gram.norm_square(gradients[::2]), gradients[::2].square().sum(1))


def on_the_interpreter() -> None:
    """Compare the Triton kernels with the references; runs where TRITON_INTERPRET=1 was set before Triton was imported."""
    from rayproj.kernels import gram_triton

    torch.manual_seed(0)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for size, tokens, d, p in ((2, 1, 5, 7), (2, 64, 32, 40), (3, 150, 33, 70)):
        x, g = torch.randn(size, tokens, d), torch.randn(size, p, tokens).mT
        torch.testing.assert_close(gram_triton.linear_gram_norm(x, g), gram.linear_gram_norm(x, g), **close)
    for sizes, sides, options in (
        ((2, 1, 3, 4), (5, 6), ((3, 3), (1, 1), (1, 1), (1, 1))),
        ((2, 2, 3, 4), (7, 6), ((3, 2), (1, 2), (2, 1), (1, 2))),
        ((1, 3, 2, 2), (4, 4), ((1, 1), (0, 0), (1, 1), (1, 1))),
    ):
        x, g, expected = conv_case(*sizes, sides, options)
        found = gram_triton.conv_gram_norm(x.float(), g.float(), *options)
        torch.testing.assert_close(found, expected.float(), **close)
    gradients, factors = torch.randn(3, 2500), torch.tensor([0.5, 0.0, 2.0])
    torch.testing.assert_close(gram_triton.norm_square(gradients), gram.norm_square(gradients), **close)
    gradients[1] = math.nan
    found, expected = torch.randn(2, 2500)[:1].repeat(2, 1)
    gram_triton.accumulate(found, gradients, factors)
    gram.accumulate(expected, gradients, factors)
    torch.testing.assert_close(found, expected, **close)


def test_the_triton_kernels_give_the_same() -> None:
    pytest.importorskip("triton")
    done = interpreter.run("-c", "from tests.kernels import test_gram; test_gram.on_the_interpreter()")
    assert done.returncode == 0, done.stderr


FLOATS = {"x", "g", "out", "pixels", "outputs", "parts", "gradients", "total", "factors"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_linear_gram", {"TILE": 64, "DEPTH": 32}),
        ("_shifted_product", {"ROWS": 3, "COLUMNS": 3, "TILE": 1024}),
        ("_norm_square", {"WIDE": 1024}),
        ("_accumulate", {"WIDE": 1024}),
    ],
)
def test_the_triton_kernels_compile_for_gpus(name: str, constants: dict[str, int], capability: int) -> None:
    """To machine code, which needs no GPU: what the interpreter allows is not all that the compiler does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rayproj.kernels import gram_triton

    kernel = getattr(gram_triton, name)
    signature = {
        a: "constexpr" if a in constants else "*fp32" if a in FLOATS else "i32" for a in kernel.arg_names
    }  # fmt: skip
    constexprs = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
