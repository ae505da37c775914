"""Keyed dropout: its masks computed with Python's integers, their statistics, and what they do not depend on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grr.components import Dropout, DropoutKeys, dropout_keys, fold_in

seeds = st.integers(0, 2**63 - 1)
BITS = 2**64 - 1


def masks(seed: int, p: float, *, b: int, s: int, uses: int, d: int) -> Tensor:
    """Returns the kept elements as ones, the dropped ones as zeros: [uses, b, s, d]."""
    keys = dropout_keys(fold_in(seed, torch.arange(b)), torch.arange(s), uses, d)
    dropped = [Dropout(p)(torch.ones(b, s, d), DropoutKeys(rows, keys.columns)) for rows in keys.rows]
    return (torch.stack(dropped) != 0).double()


def murmur(x: int) -> int:
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = ((x ^ x >> 33) * multiplier) & BITS
    return x ^ x >> 33


def folded(key: int, number: int) -> int:
    return murmur((key + (number + 1) * 0x9E3779B97F4A7C15) & BITS)


@given(seed=seeds, p=st.floats(0.01, 0.99))
def test_a_mask_is_the_formula_in_integers(seed, p):
    found = masks(seed, p, b=2, s=3, uses=2, d=4)
    for (use, b, s, d), kept in zip(
        torch.cartesian_prod(*map(torch.arange, found.shape)).tolist(), found.flatten().tolist(), strict=True
    ):
        row = folded(folded(folded(seed, b), s), use) >> 32 | 1
        column = folded(0, d) >> 32 | 1
        # int32 is signed: 0x80000000 is its smallest number, so 2^31 is added
        assert kept == ((row * column + 2**31) % 2**32 >= round(p * 2**32))


@given(seed=seeds, p=st.floats(0.05, 0.95))
def test_the_kept_fraction_is_1_minus_p_for_every_sample_position_channel_and_use(seed, p):
    found = masks(seed, p, b=8, s=16, uses=3, d=64)
    for axis in range(4):
        kept = found.transpose(0, axis).flatten(1).mean(1)
        n = found.numel() // len(kept)
        assert ((kept - (1 - p)).abs() < 5.5 * (p * (1 - p) / n) ** 0.5).all(), axis
    assert (found.mean() - (1 - p)).abs() < 4.5 * (p * (1 - p) / found.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.15, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 1])
def test_masks_of_two_samples_positions_channels_or_uses_are_uncorrelated(p, seed):
    found = masks(seed, p, b=24, s=48, uses=6, d=128)
    for axis in range(4):
        rows = found.transpose(0, axis).flatten(1)
        r = torch.corrcoef(rows).fill_diagonal_(0)
        assert r.abs().max() < 5.5 / rows.shape[1] ** 0.5, axis
        assert (r.square().mean() * rows.shape[1]).sqrt() < 1.3, axis


@given(seed=st.integers(0, 2**62))
def test_another_seed_draws_another_mask(seed):
    one, other = (masks(s, 0.5, b=2, s=8, uses=1, d=64).flatten() for s in (seed, seed + 1))
    assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 5.5 / len(one) ** 0.5


@given(seed=seeds, p=st.floats(0.01, 0.99), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_kept_elements_and_their_gradients_are_divided_by_1_minus_p(seed, p, dtype):
    rows, columns = dropout_keys(fold_in(seed, torch.arange(2)), torch.arange(5), 1, 16)
    x = torch.randn(2, 5, 16, dtype=dtype).abs_().add_(0.1).requires_grad_()
    y = Dropout(p)(x, DropoutKeys(rows[0], columns))
    gradient = torch.randn_like(x)
    y.backward(gradient)
    kept = masks(seed, p, b=2, s=5, uses=1, d=16)[0]
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    tolerance = {"rtol": torch.finfo(dtype).eps * 4, "atol": 0}
    torch.testing.assert_close(y.double(), x.double() * kept / (1 - p), **tolerance)
    torch.testing.assert_close(x.grad.double(), gradient.double() * kept / (1 - p), **tolerance)


def test_the_expectation_of_the_output_is_the_input():
    x = torch.linspace(-2, 2, 32)
    total = torch.zeros(32, dtype=torch.float64)
    for seed in range(400):
        rows, columns = dropout_keys(fold_in(seed, torch.arange(4)), torch.arange(8), 1, 32)
        total += Dropout(0.3)(x.expand(4, 8, 32), DropoutKeys(rows[0], columns)).double().sum((0, 1))
    n = 400 * 32
    assert ((total / n - x).abs() <= 4.5 * x.abs() * (0.3 / 0.7 / n) ** 0.5 + 1e-9).all()


@given(seed=seeds, b=st.integers(1, 4), s=st.integers(1, 6), first=st.integers(0, 3))
def test_the_mask_of_a_sample_depends_neither_on_its_batch_nor_on_the_generator(seed, b, s, first):
    x = torch.ones(8, 6, 16)
    samples, at = fold_in(seed, torch.arange(8)), torch.randint(0, 99, (8, 6))
    rows, columns = dropout_keys(samples, at, 2, 16)
    whole = Dropout(0.4)(x, DropoutKeys(rows[1], columns))
    torch.rand(3)
    cut = slice(first, first + b)
    rows, columns = dropout_keys(samples[cut], at[cut, :s], 5, 16)
    assert torch.equal(Dropout(0.4)(x[cut, :s], DropoutKeys(rows[1], columns)), whole[cut, :s])


def test_without_keys_it_is_torchs_dropout_and_in_evaluation_the_identity():
    x = torch.randn(3, 4, 8)
    torch.manual_seed(1)
    ours = Dropout(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(ours, torch.nn.functional.dropout(x, 0.3))
    rows, columns = dropout_keys(torch.arange(3), torch.arange(4), 1, 8)
    keys = DropoutKeys(rows[0], columns)
    assert Dropout(0.3).eval()(x, keys) is x
    assert Dropout(0.0)(x, keys) is x
    assert not Dropout(1.0)(x, keys).any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph_with_the_same_masks(backend):
    torch.compiler.reset()
    module = Dropout(0.3)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for b in (2, 3, 5):
        rows, columns = dropout_keys(torch.arange(b), torch.arange(4), 1, 8)
        x, keys = torch.randn(b, 4, 8, requires_grad=True), DropoutKeys(rows[0], columns)
        torch.testing.assert_close(compiled(x, keys), module(x, keys), rtol=0, atol=0)
        (ours,) = torch.autograd.grad(compiled(x, keys).square().sum(), x)
        (theirs,) = torch.autograd.grad(module(x, keys).square().sum(), x)
        torch.testing.assert_close(ours, theirs)
