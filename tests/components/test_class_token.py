"""ClassToken: one learned vector before the tokens of every sequence."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.components import ClassToken


@given(b=st.integers(1, 3), s=st.integers(0, 5))
def test_the_class_token_is_first_and_the_sequence_follows_unchanged(b, s):
    module, x = ClassToken(8), torch.randn(b, s, 8)
    y = module(x)
    assert torch.equal(y[:, 1:], x)
    assert torch.equal(y[:, 0], module.weight.expand(b, 8))


def test_the_class_token_receives_a_gradient_from_every_sequence():
    module = ClassToken(8)
    module(torch.randn(3, 2, 8)).sum().backward()
    assert torch.equal(module.weight.grad, torch.full((8,), 3.0))
