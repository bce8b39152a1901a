"""Who holds which element, against a loop that deals the elements out one by one."""

import random

import pytest
import torch

from rayproj.engine.layout import cut, join, pieces, runs

Share = list[tuple[str, int] | None]
"""The elements that a rank answers for, by parameter and index, where its share has them; None is padding, or another's."""


def deal(flat: Share, world_size: int) -> list[Share]:
    while len(flat) % world_size:
        flat = [*flat, None]
    part = len(flat) // world_size
    return [[flat[rank * part + i] for i in range(part)] for rank in range(world_size)]


def shares_of(sizes: dict[str, int], zero_stage: int, world_size: int, padding: int) -> list[Share]:
    parameters: list[Share] = [[(name, i) for i in range(size)] for name, size in sizes.items()]
    if zero_stage == 3:
        hands = [deal(parameter, world_size) for parameter in parameters]
        return [[element for hand in hands for element in hand[rank]] for rank in range(world_size)]
    flat = [element for parameter in parameters for element in parameter] + [None] * padding
    hands = deal(flat, world_size)
    if zero_stage == 0:  # all is there
        blank: list[Share] = [[None] * len(hand) for hand in hands]
        whole = ([*blank[:rank], hand, *blank[rank + 1 :]] for rank, hand in enumerate(hands))
        return [[value for part in parts for value in part][: len(flat)] for parts in whole]
    return hands


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_each_element_is_one_ranks_where_a_loop_puts_it_and_all_join_back(zero_stage: int, world_size: int) -> None:
    draw = random.Random(zero_stage * 10 + world_size)
    for _ in range(40):
        sizes = {f"layer@{i}.weight": draw.choice([1, 2, 3, 7, draw.randint(1, 60)]) for i in range(draw.randint(1, 6))}
        expected = shares_of(sizes, zero_stage, world_size, padding=draw.randint(0, 9))
        # An element's value is its place in the model.
        flat: Share = [(name, i) for name, size in sizes.items() for i in range(size)]
        first, whole = 0, {}
        for name, size in sizes.items():
            whole[name] = torch.arange(first, first + size).float()
            first += size
        parts: dict[str, torch.Tensor] = {}
        for rank, share in enumerate(expected):
            held = pieces(sizes, zero_stage, world_size, rank, len(share))
            found: Share = [None] * len(share)
            for piece in held:
                for i in range(piece.length):
                    assert found[piece.offset + i] is None
                    found[piece.offset + i] = (piece.name, piece.start + i)
            assert found == share
            taken: Share = [None] * len(share)
            for run in runs(sizes, held):
                taken[run.offset : run.offset + run.length] = flat[run.start : run.start + run.length]
            assert taken == share and (zero_stage == 3 or len(runs(sizes, held)) <= 1)
            values = torch.tensor([-1.0 if element is None else whole[element[0]][element[1]] for element in share])
            mine = cut(values, held)
            assert not set(mine) & set(parts)
            parts |= mine
        shuffled = dict(draw.sample(list(parts.items()), len(parts)))  # as files come in any order
        joined = join(shuffled)
        assert set(joined) == set(whole)
        assert all(torch.equal(joined[name], tensor) for name, tensor in whole.items())


def test_what_is_cut_is_the_share_itself() -> None:
    share = torch.zeros(4)
    cut(share, pieces({"a": 1, "b": 3}, 2, 1, 0, 4))["b@0"].fill_(1)
    assert share.tolist() == [0, 1, 1, 1]


def test_the_start_of_a_piece_is_a_number_and_no_word() -> None:
    """The 10th element comes after the 9th."""
    parts = {f"a@{i}": torch.tensor([float(i)]) for i in (10, 9, 0, 100)}
    assert join(parts)["a"].tolist() == [0, 9, 10, 100]
