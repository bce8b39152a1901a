"""Clipped sums against a naive loop of single-example backward passes, and their sensitivity."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed
from rayproj.errors import UserError
from rayproj.privacy.clipping import clipped_sum, refuse_cross_example_layers, with_views


class ConvNet(nn.Module):
    """Convolutions (stride, padding, groups), norms, an embedding, attention, a bare and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.embedding = nn.Embedding(5, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = F.silu(self.norm(self.grouped(self.conv(x))))
        tokens = self.layer_norm(h.flatten(2).transpose(1, 2) + self.embedding(label)[:, None]) * self.scale
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), tokens)
        return self.out(mixed).mean(1)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    noise = keyed.normal(0, "noise", batch["row"], (3, 8, 8)).to(batch["x"].dtype)
    return model(batch["x"] + 0.3 * noise, batch["label"]).square().sum(1)


def make(size: int, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[str, nn.Parameter]], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = ConvNet().to(dtype)
    batch = {
        "x": torch.randn(size, 3, 8, 8, dtype=dtype),
        "label": torch.arange(size) % 5,
        "row": torch.stack([torch.arange(size), torch.full((size,), 3), torch.zeros(size, dtype=torch.long)], 1),
    }
    return model, list(model.named_parameters()), batch


def naive(model, parameters, batch, multiplicity: int, clip_norm: float) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """One view of one example at a time, `.backward()`, everything written out."""
    total = torch.zeros(sum(p.numel() for _, p in parameters), dtype=torch.float64)
    norms = []
    for i in range(len(batch["row"])):
        gradient = torch.zeros_like(total)
        for view in range(multiplicity):
            one = {name: t[i : i + 1].clone() for name, t in batch.items()}
            one["row"][:, 2] = view
            model.zero_grad()
            losses(model, one).sum().backward()
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in parameters]
            gradient += torch.cat([g.flatten() for g in flat]).double() / multiplicity
        norms.append(gradient.norm())
        total += gradient * min(1.0, clip_norm / norms[-1].item())
    return total, torch.stack(norms)


@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_way_equals_the_naive_loop(multiplicity: int, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    model, parameters, batch = make(7, dtype)
    expected, norms = naive(model, parameters, batch, multiplicity, 7.5)
    assert (norms > 7.5).any() and (norms < 7.5).any(), "both sides of the clip norm should be tried"
    model.zero_grad()
    found, found_losses, found_norms = clipped_sum(model, losses, parameters, batch, multiplicity, 7.5, chunk)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    torch.testing.assert_close(found_norms.double(), norms, rtol=1e-5, atol=1e-6)
    assert found_losses.shape == (7,) and all(p.grad is None for _, p in parameters)


def test_a_whole_unet_of_diffusers() -> None:
    from rayproj.diffusion.conditions import Conditions
    from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig

    torch.manual_seed(0)
    model = Denoiser(
        DenoiserConfig(channels=(16, 32), head_dim=16, norm_groups=8), (4, 8, 8), Conditions({"label": 10})
    )
    batch = {"x": torch.randn(3, 4, 8, 8), "label": torch.arange(3), "row": torch.zeros(3, 3, dtype=torch.long)}

    def unet_losses(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return (m(b["x"], torch.full((len(b["x"]),), 0.4), {"label": b["label"]}) - b["x"]).square().flatten(1).mean(1)

    parameters = list(model.named_parameters())
    total = torch.zeros(sum(p.numel() for _, p in parameters))
    for i in range(3):
        model.zero_grad()
        unet_losses(model, {name: t[i : i + 1] for name, t in batch.items()}).sum().backward()
        flat = torch.cat([p.grad.flatten() for _, p in parameters])  # type: ignore[union-attr]
        total += flat * min(1.0, 0.5 / flat.norm().item())
    for chunk in (1, 3):
        found, _, _ = clipped_sum(model, unet_losses, parameters, batch, 1, 0.5, chunk)
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("value", [1e6, math.nan, math.inf, 0.0])
def test_one_example_changes_the_sum_by_at_most_the_clip_norm(chunk: int, value: float) -> None:
    model, parameters, batch = make(4, torch.float32)
    without = {name: t[:3] for name, t in batch.items()}
    batch["x"][3] = value
    with_it, _, _ = clipped_sum(model, losses, parameters, batch, 2, 0.7, chunk)
    base, _, _ = clipped_sum(model, losses, parameters, without, 2, 0.7, chunk)
    assert torch.isfinite(with_it).all()
    assert (with_it - base).norm() <= 0.7 * (1 + 1e-5)
    if not math.isfinite(value):
        torch.testing.assert_close(with_it, base)


def test_an_empty_batch_gives_zeros() -> None:
    model, parameters, batch = make(2, torch.float32)
    empty = {name: t[:0] for name, t in batch.items()}
    total, found_losses, norms = clipped_sum(model, losses, parameters, empty, 2, 1.0, 4)
    assert total.abs().sum() == 0 and len(found_losses) == len(norms) == 0


def test_views_differ_in_their_key_alone() -> None:
    _, _, batch = make(2, torch.float32)
    views = with_views(batch, 3)
    assert views["row"][:, 2].tolist() == [0, 1, 2, 0, 1, 2] and views["row"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(views["x"][3], batch["x"][1]) and batch["row"][:, 2].tolist() == [0, 0]


def test_layers_that_mix_examples_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(UserError, match=r"'1' \(BatchNorm2d\).*GroupNorm"):
        refuse_cross_example_layers(model)
    with pytest.raises(UserError, match="InstanceNorm2d"):
        refuse_cross_example_layers(nn.InstanceNorm2d(2, track_running_stats=True))
    refuse_cross_example_layers(nn.Sequential(ConvNet(), nn.InstanceNorm2d(2)))


def test_a_forward_that_keeps_what_it_saw_is_refused() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += x.detach().sum(0)
            return super().forward(x)

    model = Counting()
    batch = {"x": torch.ones(2, 3), "row": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(UserError, match="'seen'"):
        clipped_sum(model, lambda m, b: m(b["x"])[:, 0], list(model.named_parameters()), batch, 1, 1.0)
