"""Fused normalisations, forward and backward, and the guided update, against references in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rayproj.kernels import norms  # type: ignore[attr-defined]
from tests.support import interpreter
from tests.support.interpreter import READY, ready

norms_triton: Any = pytest.importorskip("rayproj.kernels.norms_triton", exc_type=ImportError) if READY else None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def check(found: Any, reference: Any, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values, and gradients of a weighted sum of them, equal those of the reference in fp64."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, theirs = found(*inputs), reference(*exact)
    ours, theirs = (o if isinstance(o, tuple) else (o,) for o in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a.double(), b, **NEAR[dtype])
    weights = [torch.linspace(-1, 1, a.numel(), device=DEVICE).view(a.shape) for a in ours]
    sum((a * w).sum() for a, w in zip(ours, weights, strict=True)).backward()
    sum((b * w.double()).sum() for b, w in zip(theirs, weights, strict=True)).backward()
    for t, e in zip(inputs, exact, strict=True):
        assert t.grad is not None and e.grad is not None and t.grad.dtype is t.dtype
        scale = e.grad.abs().max().item()
        torch.testing.assert_close(
            t.grad.double() / scale, e.grad / scale, rtol=NEAR[dtype]["rtol"], atol=NEAR[dtype]["atol"]
        )


# Sides that are no powers of two, one token, more tokens than a program takes.
@ready
@pytest.mark.parametrize("shape", [(2, 5, 12), (3, 1, 33), (1, 37, 64), (2, 16, 100)])
@pytest.mark.parametrize("dtype", NEAR)
def test_layer_norm_and_modulate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = tensors(shape, (shape[0], shape[2]), (shape[0], shape[2]), dtype=dtype)

    def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return normal * (1 + scale[:, None]) + shift[:, None]

    check(norms_triton.layer_norm_modulate, reference, inputs, dtype)
    torch.testing.assert_close(
        norms.layer_norm_modulate(*inputs).double(), reference(*[t.double() for t in inputs]), **NEAR[dtype]
    )


@ready
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 37, 33)])
@pytest.mark.parametrize("dtype", NEAR)
def test_gate_residual_layer_norm_and_modulate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    vector = (shape[0], shape[2])
    inputs = tensors(shape, shape, vector, vector, vector, dtype=dtype)

    def reference(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        r = x + gate[:, None] * h
        normal = (r - r.mean(-1, keepdim=True)) / (r.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return r, normal * (1 + scale[:, None]) + shift[:, None]

    check(norms_triton.gated_norm_modulate, reference, inputs, dtype)
    for a, b in zip(norms.gated_norm_modulate(*inputs), reference(*[t.double() for t in inputs]), strict=True):
        torch.testing.assert_close(a.double(), b, **NEAR[dtype])


@ready
def test_chunks_of_a_linear_are_taken_as_they_lie() -> None:
    """Shift and scale come as slices of one linear's output, and are not contiguous."""
    x, both = tensors((2, 5, 12), (2, 24))
    shift, scale = both.chunk(2, dim=1)
    found = norms_triton.layer_norm_modulate(x, shift, scale)
    torch.testing.assert_close(found, norms.layer_norm_modulate(x, shift, scale))
    found.sum().backward()
    assert both.grad is not None and both.grad.abs().sum() > 0


@ready
@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 3), 2), ((3, 8, 7), 8), ((1, 12, 40, 33), 3)])
@pytest.mark.parametrize("dtype", NEAR)
def test_group_norm_and_silu(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    inputs = tensors(shape, (shape[1],), (shape[1],), dtype=dtype)

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], groups, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
        affine = (1, -1, *[1] * (x.ndim - 2))
        z = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape) * weight.view(affine) + bias.view(affine)
        return z / (1 + (-z).exp())

    check(lambda x, w, b: norms_triton.group_norm_silu(x, groups, w, b), reference, inputs, dtype)
    plain = norms.group_norm_silu(inputs[0], groups, *inputs[1:])
    torch.testing.assert_close(plain.double(), reference(*[t.double() for t in inputs]), **NEAR[dtype])


@ready
@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 3), 2), ((3, 8, 7, 9), 8), ((1, 12, 40, 33), 3)])
@pytest.mark.parametrize("dtype", NEAR)
def test_group_norm_and_silu_of_pixels_whose_channels_lie_side_by_side(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms_triton, "TILE", 64)  # several tiles in a program, and several programs
    monkeypatch.setattr(norms_triton, "COLUMNS", 4)  # and several of these side by side
    monkeypatch.setattr(norms_triton, "PROGRAMS", 8)
    x, weight, bias = tensors(shape, (shape[1],), (shape[1],), dtype=dtype)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norms.group_norm_silu(x.contiguous(), groups, weight, bias)

    check(lambda x, w, b: norms_triton.group_norm_silu(x, groups, w, b), reference, [x, weight, bias], dtype)
    assert norms_triton.group_norm_silu(x, groups, weight, bias).is_contiguous(memory_format=torch.channels_last)
    far = x.detach() + 1000
    found = norms_triton.group_norm_silu(far, groups, weight, bias)
    exact = reference(far.double(), weight.double(), bias.double())
    torch.testing.assert_close(
        found.double(), exact, rtol=max(1e-3, NEAR[dtype]["rtol"]), atol=max(1e-3, NEAR[dtype]["atol"])
    )


@ready
def test_a_mean_far_from_zero_loses_nothing() -> None:
    """The sum of squares less the square of the mean would cancel here."""
    x, weight, bias = tensors((2, 4, 300), (4,), (4,))
    far = (x.detach() + 1000).requires_grad_()
    found = norms_triton.group_norm_silu(far, 2, weight, bias)
    exact = norms.group_norm_silu(far.double(), 2, weight.double(), bias.double())
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-3, atol=1e-3)
    shift, scale = tensors((2, 300), (2, 300))
    found = norms_triton.layer_norm_modulate(far, shift, scale)
    torch.testing.assert_close(found, norms.layer_norm_modulate(far, shift, scale), rtol=1e-3, atol=1e-3)


@ready
@pytest.mark.parametrize("dtype", NEAR)
def test_a_step_under_guidance(dtype: torch.dtype) -> None:
    (x,), (under, base) = tensors((3, 4, 9, 7)), tensors((3, 4, 9, 7), (3, 4, 9, 7), dtype=dtype)
    expected = 0.7 * x.double() - 0.3 * (base.double() + 4.5 * (under.double() - base.double()))
    for function in (norms_triton.guided_update, norms.guided_update):
        torch.testing.assert_close(function(x, under, base, 4.5, 0.7, -0.3).double(), expected, **NEAR[dtype])


@pytest.mark.skipif(READY, reason="this is that process, or there is a GPU")
def test_all_of_these_on_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = interpreter.tests(__file__)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
