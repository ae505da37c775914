"""Rotary embeddings: dependence of scores on positions, complex numbers in float64, and the learned embedding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grr.components import PAIRING, AxialRotaryEmbedding, MixedRotaryEmbedding, RotaryEmbedding, Rotation, rotate

HEADS = 2
KINDS = [RotaryEmbedding, AxialRotaryEmbedding, lambda head_dim: MixedRotaryEmbedding(head_dim, HEADS)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["1-D", "axial", "mixed"])
widths = st.sampled_from([4, 8, 32])
places = st.integers(-50, 50)
seeds = st.integers(0, 999)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_positions(axes: int, *shape: int, seed: int = 0) -> Tensor:
    """Returns random positions of this shape: numbers on one axis, (row, column) on two."""
    shape = shape if axes == 1 else (*shape, axes)
    return torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Multiply channels (i, i + k/2), as one complex number, by e^(i angle), in float64."""
    real, imaginary = x.double().chunk(2, dim=-1)
    y = torch.complex(real, imaginary) * torch.exp(1j * angles.double())
    return torch.cat((y.real, y.imag), dim=-1)


# Laws


@every_kind
@given(k=widths, shift=st.tuples(places, places), seed=seeds)
def test_scores_depend_only_on_the_differences_of_positions_on_each_axis(kind, k, shift, seed):
    embed = kind(k)
    q, at = normal(2, 1, HEADS, 5, k, seed=seed), random_positions(embed.axes, 2, 5, seed=seed)
    moved = at + torch.tensor(shift[: embed.axes])
    scores = embed(q[0], at[0]) @ embed(q[1], at[1]).mT  # [1, h, 5, 5]
    shifted = embed(q[0], moved[0]) @ embed(q[1], moved[1]).mT
    torch.testing.assert_close(shifted, scores, atol=1e-3, rtol=0)


@every_kind
@given(k=widths, seed=seeds)
def test_every_pair_of_channels_keeps_its_length(kind, k, seed):
    embed = kind(k)
    x = normal(2, HEADS, 5, k, seed=seed)
    y = embed(x, random_positions(embed.axes, 5, seed=seed))
    torch.testing.assert_close(y.unflatten(-1, (2, -1)).norm(dim=-2), x.unflatten(-1, (2, -1)).norm(dim=-2))


@every_kind
def test_position_zero_is_the_identity_and_every_axis_rotates(kind):
    embed, x = kind(8), normal(1, HEADS, 1, 8)
    origin = torch.zeros(1) if embed.axes == 1 else torch.zeros(1, 2)
    torch.testing.assert_close(embed(x, origin), x, atol=0, rtol=0)
    for axis in range(embed.axes):
        place = origin.clone()
        place.view(-1)[axis] = 1
        assert (embed(x, place) - x).abs().max() > 0.1


@given(k=widths, seed=seeds)
def test_rotations_add_up(k, seed):
    x, a, b = normal(1, 1, 3, k, seed=seed), normal(3, k // 2, seed=seed + 1), normal(3, k // 2, seed=seed + 2)
    torch.testing.assert_close(rotate(rotate(x, a), b), rotate(x, a + b))
    torch.testing.assert_close(rotate(rotate(x, a), -a), x)


@every_kind
@given(seed=seeds)
def test_each_row_of_a_batch_may_have_different_positions(kind, seed):
    embed, x = kind(8), normal(3, HEADS, 5, 8, seed=seed)
    at = random_positions(embed.axes, 3, 5, seed=seed)
    one_by_one = [embed(row[None], place) for row, place in zip(x, at, strict=True)]
    torch.testing.assert_close(embed(x, at), torch.cat(one_by_one), atol=1e-5, rtol=0)


@every_kind
def test_angles_are_float32_and_broadcast_over_batch_and_heads_as_documented(kind):
    embed = kind(8)
    heads = HEADS if isinstance(embed, MixedRotaryEmbedding) else 1
    assert embed.angles(random_positions(embed.axes, 5)).shape == (heads, 5, 4)
    angles = embed.bfloat16().angles(random_positions(embed.axes, 3, 5))
    assert angles.shape == (3, heads, 5, 4)
    assert angles.dtype == torch.float32


@every_kind
def test_autocast_does_not_change_the_angles(kind):
    embed = kind(8)
    at = random_positions(embed.axes, 5)
    expected = embed.angles(at)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embed.angles(at), expected)


@every_kind
@given(seed=seeds)
def test_bfloat16_differs_by_one_rounding_of_the_output(kind, seed):
    """The error is at most 2^-8 of the norm of a pair, at every position."""
    embed, x = kind(8), normal(2, HEADS, 5, 8, seed=seed).bfloat16()
    at = random_positions(embed.axes, 5, seed=seed)
    error = (embed(x, at).double() - rotated(x, embed.angles(at))).unflatten(-1, (2, -1)).norm(dim=-2)
    length = x.double().unflatten(-1, (2, -1)).norm(dim=-2)
    assert (error <= (2**-8 + 1e-6) * length).all()


@given(k=widths, seed=seeds)
def test_the_gradient_is_rotated_by_the_negative_angles(k, seed):
    x, angles = normal(2, HEADS, 5, k, seed=seed).requires_grad_(), normal(5, k // 2, seed=seed + 1)
    gradient = normal(2, HEADS, 5, k, seed=seed + 2)
    rotate(x, angles).backward(gradient)
    torch.testing.assert_close(x.grad, rotate(gradient, -angles), rtol=0, atol=0)


def test_first_and_second_derivatives_equal_central_differences():
    x, rotation = normal(2, HEADS, 3, 8).double().requires_grad_(), Rotation(normal(3, 4, seed=1))
    assert torch.autograd.gradcheck(rotate, (x, rotation))
    assert torch.autograd.gradgradcheck(rotate, (x, rotation))


# Agreement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(k=widths, seed=seeds)
def test_a_rotation_and_its_gradient_are_the_formula_in_float32(dtype, k, seed):
    """The formula rounds each product, the kernels once per sum: within two units in the last place of a pair."""
    x, gradient = (normal(2, HEADS, 5, k, seed=seed + i).to(dtype) for i in range(2))
    angles = normal(2, 1, 5, k // 2, seed=seed + 2) * 9
    x.requires_grad_()
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)
    ours, theirs = (torch.autograd.grad(y, x, gradient)[0] for y in (rotate(x, Rotation(angles)), expected))
    tolerance = {"rtol": 0, "atol": 10 * torch.finfo(dtype).eps}
    torch.testing.assert_close(rotate(x, angles), expected, **tolerance)
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_it_takes_three_kernels_each_way_and_keeps_nothing_of_x(kernels, saved_bytes):
    x, rotation = normal(2, HEADS, 5, 8).bfloat16().requires_grad_(), Rotation(normal(5, 4))
    assert saved_bytes(lambda: rotate(x, rotation), rotation.cos, rotation.sin) == 0
    assert kernels(lambda: rotate(x, rotation)) == {"mul": 1, "roll": 1, "addcmul": 1}
    y = rotate(x, rotation)
    assert kernels(lambda: torch.autograd.grad(y, x, y)) == {"mul": 1, "roll": 1, "addcmul": 1}


@given(k=widths, base=st.sampled_from([100.0, 10_000.0]), seed=seeds)
def test_the_rotation_of_one_axis_equals_complex_multiplication(k, base, seed):
    x, at = normal(2, HEADS, 5, k, seed=seed), random_positions(1, 5, seed=seed)
    angles = [[m * base ** (-2 * i / k) for i in range(k // 2)] for m in at.tolist()]
    y = RotaryEmbedding(k, base=base)(x, at)
    torch.testing.assert_close(y.double(), rotated(x, torch.tensor(angles)), atol=1e-4, rtol=0)


@given(k=widths, base=st.sampled_from([100.0, 10_000.0]), seed=seeds)
def test_the_axial_embedding_rotates_half_of_the_pairs_by_the_row_and_half_by_the_column(k, base, seed):
    x, at = normal(2, HEADS, 5, k, seed=seed), random_positions(2, 5, seed=seed)
    angles = [[m * base ** (-4 * i / k) for m in place for i in range(k // 4)] for place in at.tolist()]
    y = AxialRotaryEmbedding(k, base=base)(x, at)
    torch.testing.assert_close(y.double(), rotated(x, torch.tensor(angles)), atol=1e-4, rtol=0)


@given(k=widths, seed=seeds)
def test_the_mixed_embedding_rotates_every_pair_by_row_and_column_with_its_frequencies(k, seed):
    x, at = normal(2, HEADS, 5, k, seed=seed), random_positions(2, 5, seed=seed)
    embed = MixedRotaryEmbedding(k, HEADS)
    angles = [
        [[row * f + column * g for f, g in head] for row, column in at.tolist()] for head in embed.frequencies.tolist()
    ]
    torch.testing.assert_close(embed(x, at).double(), rotated(x, torch.tensor(angles)), atol=1e-4, rtol=0)


@given(k=widths, seed=seeds)
def test_interleaved_pairs_differ_by_a_permutation_of_channels_and_have_the_same_scores(k, seed):
    """PAIRING records this choice: pairs (2i, 2i + 1), as in RoFormer's equation 34, are moved to (i, i + k/2)."""
    assert PAIRING == "halves"
    q, at = normal(2, 1, 1, 5, k, seed=seed), random_positions(1, 5, seed=seed)
    angles = RotaryEmbedding(k).angles(at)
    interleaved = []
    for x in q:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
        interleaved.append(torch.view_as_real(pairs).flatten(-2))
    order = torch.arange(k).view(-1, 2).T.flatten()  # 0 2 4 ... 1 3 5 ...
    halves = [rotate(x[..., order], angles) for x in q]
    torch.testing.assert_close(halves[0], interleaved[0][..., order], atol=1e-5, rtol=0)
    torch.testing.assert_close(halves[0] @ halves[1].mT, interleaved[0] @ interleaved[1].mT, atol=1e-4, rtol=0)


# The learned embedding


def test_the_mixed_embedding_equals_the_axial_one_if_its_frequencies_lie_on_the_axes():
    axial, mixed = AxialRotaryEmbedding(16, base=10.0), MixedRotaryEmbedding(16, HEADS, base=10.0)
    steps = axial.angles(torch.tensor([[1, 0], [0, 1]]))[0]  # [2, k/2], of one row and of one column
    with torch.no_grad():
        mixed.frequencies.copy_(steps.T.expand(HEADS, -1, -1))
    x, at = normal(1, HEADS, 9, 16), torch.cartesian_prod(torch.arange(3), torch.arange(3))
    torch.testing.assert_close(mixed(x, at), axial(x, at), atol=1e-5, rtol=0)


@given(h=st.integers(1, 4), k=widths, seed=seeds)
def test_mixed_frequencies_start_with_axial_lengths_in_two_orthogonal_directions(h, k, seed):
    torch.manual_seed(seed)
    frequencies = MixedRotaryEmbedding(k, h).frequencies.detach()
    assert frequencies.numel() == h * k
    first, second = frequencies.chunk(2, dim=1)  # [h, k/4, 2]
    lengths = torch.tensor([10 ** (-4 * i / k) for i in range(k // 4)]).expand(h, -1)
    torch.testing.assert_close(first.norm(dim=-1), lengths)
    torch.testing.assert_close(second.norm(dim=-1), lengths)
    torch.testing.assert_close((first * second).sum(-1), torch.zeros(h, k // 4), atol=1e-6, rtol=0)


def test_every_head_of_the_mixed_embedding_starts_with_another_direction():
    row, column = MixedRotaryEmbedding(8, 6).frequencies[:, 0].T
    assert len({round(math.atan2(y, x), 3) for y, x in zip(row.tolist(), column.tolist(), strict=True)}) == 6


def test_gradients_reach_the_mixed_frequencies():
    embed, x = MixedRotaryEmbedding(8, HEADS), normal(1, HEADS, 4, 8)
    scores = embed(x, random_positions(2, 4)) @ x.mT
    scores.square().sum().backward()
    assert (embed.frequencies.grad != 0).all()


# Errors


@pytest.mark.parametrize(
    ("kind", "head_dim", "message"),
    [
        (KINDS[0], 5, "RotaryEmbedding: head_dim must be even, because channels form pairs, got head_dim=5"),
        (KINDS[1], 6, "AxialRotaryEmbedding: head_dim must be a multiple of 4, .* half of its pairs, got head_dim=6"),
        (KINDS[2], 6, "MixedRotaryEmbedding: head_dim must be a multiple of 4, got head_dim=6"),
    ],
)
def test_a_head_dim_that_cannot_be_paired_is_refused(kind, head_dim, message):
    with pytest.raises(ValueError, match=message):
        kind(head_dim)


def test_the_bases_are_those_of_the_papers():
    """The bases are RoFormer's 10,000 for text, RoPE-ViT's 100 and 10 for images; the slowest pair depends on them."""
    one = torch.ones(1)
    slowest = RotaryEmbedding(64).angles(one).flatten()[-1]
    torch.testing.assert_close(slowest, torch.tensor(10_000.0 ** (-62 / 64)))
    slowest = AxialRotaryEmbedding(64).angles(torch.ones(1, 2)).flatten()[-1]
    torch.testing.assert_close(slowest, torch.tensor(100.0 ** (-15 / 16)))
    lengths = MixedRotaryEmbedding(64, 1).frequencies[0].norm(dim=-1)
    torch.testing.assert_close(lengths.min(), torch.tensor(10.0 ** (-15 / 16)))
