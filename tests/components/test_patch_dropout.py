"""Patch dropout: which tokens it keeps, how many, and what that does not depend on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.components import PatchDropout, fold_in, num_kept

seeds = st.integers(0, 2**63 - 1)
fractions = st.floats(0.01, 0.99)


def kept(keys: torch.Tensor | None, *, p: float, s: int, num_fixed: int = 0, b: int = 4) -> torch.Tensor:
    """Returns the kept positions, after a check that the vectors are those of the positions: [b, k]."""
    x = torch.rand(b, s, 3)
    vectors, positions = PatchDropout(p, num_fixed=num_fixed)(x, torch.arange(s), keys=keys)
    rows = torch.arange(b).unsqueeze(1)
    assert torch.equal(vectors, x[rows, positions])
    return positions


@given(seed=seeds, p=fractions, s=st.integers(1, 40), num_fixed=st.integers(0, 2), keyed=st.booleans())
def test_a_fixed_number_of_different_tokens_is_kept_in_order_and_the_fixed_ones_always(seed, p, s, num_fixed, keyed):
    keys = fold_in(seed, torch.arange(4)) if keyed else None
    positions = kept(keys, p=p, s=s + num_fixed, num_fixed=num_fixed)
    assert positions.shape == (4, num_fixed + max(1, round(s * (1 - p))))
    assert (positions.diff(dim=1) > 0).all()
    assert torch.equal(positions[:, :num_fixed], torch.arange(num_fixed).expand(4, -1))
    assert positions.max() < s + num_fixed


@given(seed=seeds, p=fractions, s=st.integers(1, 40))
def test_what_is_kept_depends_on_a_samples_key_and_not_on_the_batch_or_torchs_generator(seed, p, s):
    keys = fold_in(seed, torch.arange(6))
    together = kept(keys, p=p, s=s, b=6)
    torch.rand(1)
    alone = torch.cat([kept(keys[i : i + 2], p=p, s=s, b=2) for i in (0, 2, 4)])
    assert torch.equal(together, alone)
    assert torch.equal(kept(keys.flip(0), p=p, s=s, b=6), together.flip(0))


@pytest.mark.parametrize("keyed", [True, False])
def test_every_patch_and_every_pair_of_patches_is_kept_equally_often(keyed):
    b, s, p = 20_000, 12, 0.5
    positions = kept(fold_in(3, torch.arange(b)) if keyed else None, p=p, s=s, b=b)
    mask = torch.zeros(b, s).scatter(1, positions, 1.0)
    together = mask.T @ mask / b  # a diagonal of 1/2, beside it 1/2 * 5/11
    expected = torch.full((s, s), 0.5 * 5 / 11).fill_diagonal_(0.5)
    assert (together - expected).abs().max() < 5.5 * 0.5 / b**0.5


def test_evaluation_and_a_fraction_of_zero_keep_all_tokens():
    x, positions = torch.rand(2, 5, 3), torch.arange(5)
    for module in (PatchDropout(0.5).eval(), PatchDropout(0.0)):
        assert module(x, positions, keys=torch.arange(2)) == (x, positions)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_leaves_no_patch_is_refused(p):
    with pytest.raises(ValueError, match=f"p must be from 0 to below 1, got p={p}"):
        PatchDropout(p)


def test_the_number_kept_is_the_nearest_whole_one():
    assert [num_kept(256, p) for p in (0.0, 0.5, 0.9, 0.999)] == [256, 128, 26, 1]
