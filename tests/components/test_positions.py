"""Absolute positions: the formula of Vaswani et al., and a learned table."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.components import LearnedPositions, SinusoidalPositions


@given(dim=st.sampled_from([2, 4, 10, 64]), positions=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_sinusoidal_positions_equal_the_formula_of_vaswani(dim, positions):
    table = SinusoidalPositions(dim)(torch.tensor(positions))
    for row, position in zip(table, positions, strict=True):
        for i in range(dim // 2):
            angle = position / 10_000 ** (2 * i / dim)
            assert row[2 * i].item() == pytest.approx(math.sin(angle), abs=2e-4)
            assert row[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=2e-4)


@given(i=st.integers(0, 300), j=st.integers(0, 300), shift=st.integers(0, 200))
def test_products_of_sinusoidal_positions_depend_only_on_their_difference(i, j, shift):
    encode = SinusoidalPositions(32)
    a, b, c, d = encode(torch.tensor([i, j, i + shift, j + shift]))
    torch.testing.assert_close(a @ b, c @ d, atol=1e-3, rtol=0)


@given(shape=st.sampled_from([(3,), (2, 4), (1, 2, 3)]), seed=st.integers(0, 99))
def test_learned_positions_are_rows_of_a_table(shape, seed):
    module = LearnedPositions(6, 10)
    positions = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(positions), torch.nn.functional.embedding(positions, module.weight))


def test_only_positions_that_were_looked_up_receive_a_gradient():
    module = LearnedPositions(6, 10)
    module(torch.tensor([2, 7])).sum().backward()
    assert module.weight.grad.any(-1).nonzero().flatten().tolist() == [2, 7]


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="SinusoidalPositions: dim must be even, got dim=5"):
        SinusoidalPositions(5)
