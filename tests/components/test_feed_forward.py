"""The feed-forward networks against their formulas, with GELU computed from the error function."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grr.components import GEGLU, FeedForward, SwiGLU

sizes = st.tuples(st.integers(1, 12), st.integers(1, 20))  # dim, hidden_dim
seeds = st.integers(0, 999)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gelu(x: Tensor) -> Tensor:
    """Compute x times the probability that a standard normal variable is below x."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def random(module: nn.Module, seed: int) -> nn.Module:
    for i, parameter in enumerate(module.double().parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + i)
    return module


@given(sizes=sizes, seed=seeds)
def test_geglu_is_its_formula(sizes, seed):
    dim, hidden = sizes
    module, x = random(GEGLU(*sizes), seed), normal(2, 3, dim, seed=seed)
    w, b, v, c = *(t[:hidden] for t in module.up.parameters()), *(t[hidden:] for t in module.up.parameters())
    expected = (gelu(x @ w.T + b) * (x @ v.T + c)) @ module.down.weight.T + module.down.bias
    torch.testing.assert_close(module(x), expected)


@given(sizes=sizes, bias=st.booleans(), seed=seeds)
def test_swiglu_is_its_formula(sizes, bias, seed):
    dim, hidden = sizes
    module, x = random(SwiGLU(*sizes, bias=bias), seed), normal(2, 3, dim, seed=seed)
    gate, value = (x @ half.T for half in module.up.weight.chunk(2))
    if bias:
        gate, value = gate + module.up.bias[:hidden], value + module.up.bias[hidden:]
    expected = (gate / (1 + torch.exp(-gate)) * value) @ module.down.weight.T
    torch.testing.assert_close(module(x), expected + module.down.bias if bias else expected)


@given(sizes=sizes, seed=seeds)
def test_feed_forward_is_its_formula(sizes, seed):
    module, x = random(FeedForward(*sizes), seed), normal(2, 3, sizes[0], seed=seed)
    expected = gelu(x @ module.up.weight.T + module.up.bias) @ module.down.weight.T + module.down.bias
    torch.testing.assert_close(module(x), expected)


@given(sizes=sizes, seed=seeds)
def test_every_token_is_computed_independently(sizes, seed):
    x = normal(4, sizes[0], seed=seed)
    for module in (random(kind(*sizes), seed) for kind in (GEGLU, SwiGLU, FeedForward)):
        torch.testing.assert_close(module(x), torch.stack([module(token) for token in x]))


@given(sizes=sizes)
def test_parameter_counts(sizes):
    d, hidden = sizes
    assert sum(p.numel() for p in FeedForward(d, hidden).parameters()) == 2 * d * hidden + hidden + d
    for gated in (GEGLU, SwiGLU):
        assert sum(p.numel() for p in gated(d, hidden).parameters()) == 3 * d * hidden + 2 * hidden + d
    assert sum(p.numel() for p in SwiGLU(d, hidden, bias=False).parameters()) == 3 * d * hidden
