"""ClassToken: one vector before all others, the same for every sequence."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.components import ClassToken


@given(b=st.integers(1, 3), s=st.integers(0, 5))
def test_a_sequence_is_kept_and_led_by_the_same_vector_everywhere(b, s):
    module, x = ClassToken(8), torch.randn(b, s, 8)
    y = module(x)
    assert torch.equal(y[:, 1:], x)
    assert torch.equal(y[:, 0], module.weight.expand(b, 8))


def test_it_is_learned():
    module = ClassToken(8)
    module(torch.randn(3, 2, 8)).sum().backward()
    assert torch.equal(module.weight.grad, torch.full((8,), 3.0))
