"""The vocabulary head in chunks is the head over all tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grr.models.head import token_losses


@given(count=st.integers(0, 40), chunk=st.integers(1, 50), seed=st.integers(0, 99))
def test_the_chunked_head_has_the_loss_and_gradients_of_the_whole(count, chunk, seed):
    torch.manual_seed(seed)
    head = nn.Linear(8, 30).double()
    hidden = torch.randn(count, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 30, (count,))
    token_losses(hidden, targets, head, chunk=chunk).sum().backward()
    chunked = [hidden.grad, head.weight.grad, head.bias.grad]
    hidden.grad = head.weight.grad = head.bias.grad = None
    nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum").backward()
    for piece, whole in zip(chunked, [hidden.grad, head.weight.grad, head.bias.grad], strict=True):
        torch.testing.assert_close(piece, whole, atol=1e-6, rtol=1e-5)
