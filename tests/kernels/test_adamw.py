"""AdamW with averages of the weights in one pass, against torch's and the averages written out."""

from typing import Any

import pytest
import torch

from rayproj.kernels import adamw  # type: ignore[attr-defined]
from tests.support import interpreter
from tests.support.interpreter import READY, ready

adamw_triton: Any = pytest.importorskip("rayproj.kernels.adamw_triton", exc_type=ImportError) if READY else None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@ready
@pytest.mark.parametrize("averages", [0, 1, 2, 3])
def test_adamw_with_averages_is_torchs_and_the_lerps(averages: int) -> None:
    size, decays = 2500, [0.9, 0.99, 0.5][:averages]
    torch.manual_seed(0)
    weights = torch.randn(size, device=DEVICE)
    peer = weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([peer], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    states = {
        name: [weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)] for name in ("fused", "plain")
    }
    kept = {name: [weights.clone() for _ in decays] for name in ("fused", "plain", "peer")}
    for updates in range(1, 5):
        gradient = torch.randn(size, device=DEVICE)
        peer.grad = gradient.clone()
        optimizer.step()
        for average, decay in zip(kept["peer"], decays, strict=True):
            average.mul_(decay).add_(peer.detach(), alpha=1 - decay)
        options = (decays, updates, 1e-2, (0.9, 0.99), 1e-8, 0.1)
        adamw_triton.update_with_averages(gradient.clone(), *states["fused"], kept["fused"], *options)
        adamw.update_with_averages(gradient.clone(), *states["plain"], kept["plain"], *options)
    for name in ("fused", "plain"):
        torch.testing.assert_close(states[name][0], peer.detach(), rtol=1e-5, atol=1e-6)
        for found, expected in zip(kept[name], kept["peer"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(READY, reason="this is that process, or there is a GPU")
def test_all_of_these_on_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = interpreter.tests(__file__)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
