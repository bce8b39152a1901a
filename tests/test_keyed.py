"""Keyed random numbers: known answers, the right distribution, and a pure function of their key."""

import math

import torch
from scipy import stats

from rayproj import keyed


def rows(indices: list[int], step: int = 0, view: int = 0) -> torch.Tensor:
    return torch.tensor([[i, step, view] for i in indices])


def test_a_row_has_the_same_numbers_whatever_its_batch() -> None:
    whole = keyed.normal(7, "noise", rows([0, 1, 2, 3, 4]), (3, 5))
    parts = [keyed.normal(7, "noise", rows([i]), (3, 5)) for i in range(5)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[[4, 0]], keyed.normal(7, "noise", rows([4, 0]), (3, 5)))


def test_a_longer_draw_begins_like_a_shorter_one() -> None:
    assert torch.equal(keyed.uniform(0, "a", rows([3]), (5,)), keyed.uniform(0, "a", rows([3]), (9,))[:, :5])


def test_every_part_of_the_key_matters() -> None:
    base = keyed.uniform(0, "a", rows([1], 2, 3), (64,))
    others = [
        keyed.uniform(1, "a", rows([1], 2, 3), (64,)),
        keyed.uniform(0, "b", rows([1], 2, 3), (64,)),
        keyed.uniform(0, "a", rows([2], 2, 3), (64,)),
        keyed.uniform(0, "a", rows([1], 3, 3), (64,)),
        keyed.uniform(0, "a", rows([1], 2, 4), (64,)),
    ]
    for other in others:
        assert not (base == other).any()


def test_normals_are_normal_and_uncorrelated() -> None:
    draw = keyed.normal(0, "noise", rows(list(range(4000))), (4, 5)).double()
    assert stats.kstest(draw.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(draw.mean()) < 4 / math.sqrt(draw.numel())
    assert abs(draw.var() - 1) < 4 * math.sqrt(2 / draw.numel())
    correlation = torch.corrcoef(draw.flatten(1).T) - torch.eye(20)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_uniforms_fill_the_unit_interval() -> None:
    draw = keyed.uniform(0, "u", rows(list(range(20000)))).double()
    assert draw.shape == (20000,)
    assert draw.min() >= 0 and draw.max() < 1
    assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-3
