"""Networks of diffusers with our kernels: the same outputs and gradients, under the same names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rayproj.diffusion.conditions import Conditions
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, Network
from rayproj.diffusion.fusing import Block, GroupNormSilu, fuse
from rayproj.kernels import admission  # type: ignore[attr-defined]
from tests.support import interpreter
from tests.support.interpreter import READY, ready

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM = "layer norm + modulate"
NETWORKS = {
    "unet": DenoiserConfig(channels=(16, 32), norm_groups=8, head_dim=16),
    "dit": DenoiserConfig(Network.dit, layers=2, heads=2, head_dim=16),
}


def models(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Denoiser(NETWORKS[name], (4, 8, 8), Conditions({"label": 3}, ())).to(DEVICE)
    for parameter in plain.parameters():  # a DiT's gates begin at zero, and would hide all else
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


def same(plain: nn.Module, fused: nn.Module) -> None:
    torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions would round to ten bits
    assert list(plain.state_dict()) == list(fused.state_dict())
    x, t = torch.randn(3, 4, 8, 8, device=DEVICE), torch.rand(3, device=DEVICE)
    label = torch.tensor([0, 2, -1], device=DEVICE)
    found, gradients = [], []
    for model in (plain, fused):
        out = model(x, t, {"label": label})
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True))
        found.append(out)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_gpu_they_are_as_they_were(name: str) -> None:
    plain, fused = models(name)
    assert any(isinstance(m, GroupNormSilu if name == "unet" else Block) for m in fused.modules())
    same(plain, fused)


@ready
@pytest.mark.parametrize("name", NETWORKS)
def test_with_the_kernels_they_are_the_same_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(admission, "admits", lambda kernel, x: asked.append(kernel) or True)
    plain, fused = models(name)
    same(plain, fused)
    assert set(asked) == ({"group norm + SiLU"} if name == "unet" else {NORM, f"gate + residual + {NORM}"})


def test_weights_of_others_keep_their_scale_and_shift_blocks() -> None:
    """A ResNet block whose time scales is not of the kind that our layers stand for."""
    from diffusers.models.resnet import ResnetBlock2D

    block: Any = ResnetBlock2D(in_channels=32, temb_channels=16, time_embedding_norm="scale_shift")
    fuse(nn.ModuleList([block]))
    assert type(block.norm1) is nn.GroupNorm and isinstance(block.nonlinearity, nn.SiLU)


@pytest.mark.skipif(READY, reason="this is that process, or there is a GPU")
def test_all_of_these_on_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = interpreter.tests(__file__)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
