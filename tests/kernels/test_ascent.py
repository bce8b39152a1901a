"""One step of APGD in one kernel, against the projections of the threat models."""

from typing import Any

import pytest
import torch

from rayproj.kernels import ascent  # type: ignore[attr-defined]
from rayproj.robustness.pgd import steepest
from rayproj.robustness.threats import Norm, Threat, wide
from tests.support import interpreter
from tests.support.interpreter import READY, ready

ascent_triton: Any = pytest.importorskip("rayproj.kernels.ascent_triton", exc_type=ImportError) if READY else None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREATS = [Threat(Norm.linf, 0.1), Threat(Norm.l2, 1.5)]


def drawn(threat: Threat, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.rand(shape, generator=g)
    point, before = (threat.project(x, x + torch.randn(shape, generator=g)) for _ in range(2))
    gradient = torch.randn(shape, generator=g)
    gradient[0], gradient[1, 0, 0] = 0, 0  # as of an example whose gradient vanishes
    return tuple(t.to(DEVICE) for t in (x, point, before, gradient, torch.rand(shape[0], generator=g)))


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("momentum", [1.0, 0.75])
def test_the_reference_is_the_algorithm(threat: Threat, momentum: float) -> None:
    x, point, before, gradient, step = drawn(threat, (4, 3, 5, 6))
    z = threat.project(x, point + wide(step, x) * steepest(gradient, threat.norm))
    expected = threat.project(x, point + momentum * (z - point) + (1 - momentum) * (point - before))
    found = ascent.move(x, point, before, gradient, step, threat.eps, momentum, threat.norm is Norm.l2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert threat.holds(x, found).all()


@ready
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("momentum", [1.0, 0.75])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (2, 1, 40, 41)])
def test_the_kernel_is_the_reference(threat: Threat, momentum: float, shape: tuple[int, ...]) -> None:
    tensors = drawn(threat, shape)
    told = (threat.eps, momentum, threat.norm is Norm.l2)
    torch.testing.assert_close(ascent_triton.move(*tensors, *told), ascent.move(*tensors, *told), rtol=0, atol=1e-6)


@pytest.mark.skipif(READY, reason="this is that process, or there is a GPU")
def test_all_of_these_on_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = interpreter.tests(__file__)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
