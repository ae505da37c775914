"""RMSNorm: invariance to scale, the formula, torch's module, and accuracy in bfloat16."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grr.components import LayerNorm, RMSNorm

seeds = st.integers(0, 999)
dims = st.sampled_from([1, 2, 7, 64])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(dim=dims, scale=st.floats(1e-3, 1e3), seed=seeds)
def test_a_multiple_of_a_vector_is_normalised_to_the_same_vector(dim, scale, seed):
    x, norm = normal(3, dim, seed=seed), RMSNorm(dim, eps=0.0).double()
    torch.testing.assert_close(norm(scale * x), norm(x))
    torch.testing.assert_close(norm(-scale * x), -norm(x))


@given(dim=dims, seed=seeds)
def test_the_root_mean_square_of_a_fresh_norm_is_one(dim, seed):
    y = RMSNorm(dim, eps=0.0).double()(normal(4, dim, seed=seed))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, dtype=torch.float64))


@given(dim=dims, eps=st.sampled_from([1e-6, 1e-2, 1.0]), seed=seeds)
def test_rms_norm_is_its_formula(dim, eps, seed):
    x, norm = normal(2, 3, dim, seed=seed), RMSNorm(dim, eps=eps).double()
    nn.init.normal_(norm.weight)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / dim + eps) ** 0.5 * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_agrees_with_torch(dtype):
    ours, theirs = RMSNorm(16).to(dtype), nn.RMSNorm(16, eps=1e-6).to(dtype)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = normal(5, 16, seed=0).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@given(dim=st.sampled_from([64, 768, 4096]), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=seeds)
def test_the_mean_of_bfloat16_values_is_taken_in_float32(dim, scale, seed):
    """The only error is one rounding of the output, 2^-8 of each channel; a sum in bfloat16 would stop at 256."""
    x, norm = (scale * normal(2, dim, seed=seed)).bfloat16(), RMSNorm(dim, eps=0.0)
    exact = norm.double()(x.double())
    assert ((norm.bfloat16()(x).double() - exact).abs() <= (2**-8 + 1e-6) * exact.abs()).all()


def test_the_output_has_the_dtype_of_the_input_for_any_dtype_of_the_weight():
    norm = RMSNorm(8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert norm(torch.ones(2, 8, dtype=dtype)).dtype == dtype


def test_layer_norm_is_torchs_own():
    assert LayerNorm is nn.LayerNorm
